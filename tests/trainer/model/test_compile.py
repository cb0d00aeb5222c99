import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.training import make_net, make_state, make_train_step, run_fit, same_tensors
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model import compile as model_compile
from trainer.model.batch_norm import allow_single_value_batches
from trainer.model.compile import check_compiler, compile_model


def test_each_batch_size_is_compiled_once_and_names_stay(
    ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_compile, "BACKEND", "eager")
    torch.compiler.reset()
    counters.clear()
    plain, compiled = (make_net(batch_norm=True, dropout=0.5) for _ in range(2))
    for net in (plain, compiled):
        allow_single_value_batches(net)
    states = [make_state(net, ctx, ema=0.9, momentum=0.9) for net in (plain, compiled)]
    for model in (states[1].model, states[1].ema.model):
        compile_model(model)

    def evaluate(model: torch.nn.Module, interrupted: object) -> dict[str, object]:
        for size in (5, 2, 5):
            with torch.inference_mode():
                model.eval()(torch.ones(size, 3, 8, 8))
        model.train()
        return {}

    for state in states:
        run_fit(state, make_train_step(ctx), evaluate=evaluate)  # type: ignore[arg-type]
    assert counters["stats"]["unique_graphs"] == 4, "sizes 4 and 3 of two epochs, and 5 and 2 of the evaluation"
    assert not counters["graph_break"]
    assert same_tensors(states[0].state_dict()["model"], states[1].state_dict()["model"])
    assert same_tensors(states[0].state_dict()["ema"], states[1].state_dict()["ema"])
    assert compiled._compiled_call_impl is not None
    assert copy.deepcopy(compiled)._compiled_call_impl is None


def test_no_compiler_is_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

    monkeypatch.setattr(model_compile, "BACKEND", no_compiler)
    torch.compiler.reset()
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found .* needs g\+\+, .*: install them, or set"):
        check_compiler(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_kernels_are_built_here() -> None:
    torch.compiler.reset()
    check_compiler(torch.device("cpu"))
