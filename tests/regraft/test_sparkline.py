import pytest

from regraft.sparkline import sparkline


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 3, ""),
        ([1.0], 3, "▁"),
        ([2.0, 2.0], 3, "▁▁"),
        ([9.0, 4.0, 1.5], 20, "█▃▁"),
        ([0.0, 2.0, 4.0, 6.0], 2, "▁█"),
        (range(100), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_sparkline_is_scaled_to_its_values_and_never_wider_than_asked(
    values: list[float], width: int, expected: str
) -> None:
    assert sparkline(values, width=width) == expected
