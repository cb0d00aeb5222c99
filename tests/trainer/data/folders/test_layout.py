"""Structures of popular datasets: splits and classes are right, or an error names the option; never a wrong model."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from regraft.contract import ATTEMPTS, CONFIG, CONFIG_HEADER, create_output_folder
from trainer.config.sections.data import DataConfig
from trainer.data.csv.table import TableFormat
from trainer.data.index import DatasetIndex
from trainer.data.read_index import read_index
from trainer.errors import UserError


def build(root: Path, *patterns: str) -> Path:
    """Create empty files; {a,b} in a pattern stands for each of the names, and 3*.jpg for three files."""
    for pattern in patterns:
        for name in expand(pattern):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def expand(pattern: str) -> Iterable[str]:
    before, brace, rest = pattern.partition("{")
    if brace:
        names, _, after = rest.partition("}")
        for name in names.split(","):
            yield from expand(before + name + after)
    elif "3*" in pattern:
        yield from (pattern.replace("3*", str(i)) for i in range(3))
    else:
        yield pattern


def read(root: Path, **dirs: str) -> DatasetIndex:
    return read_index(
        root, val_fraction=0, test_fraction=0.4, seed=0, extensions=DataConfig().extensions, split_dirs=dirs
    )


CD = "{cats,dogs}/3*.jpg"
MADE = "a split of 40 %"


@pytest.mark.parametrize(
    ("patterns", "classes", "sizes", "reported"),
    [
        # Kaggle's cats and dogs, Intel's scenes, the ASL alphabet, Fruits-360, chest X-rays, flowers
        ([f"training_set/training_set/{CD}", f"test_set/test_set/{CD}", "training_set/training_set/_DS_Store"],
         "cats dogs", (6, 0, 6), "test_set/test_set/"),
        ([f"seg_train/seg_train/{CD}", f"seg_test/seg_test/{CD}", "seg_pred/seg_pred/3*.jpg"],
         "cats dogs", (6, 0, 6), "seg_test/seg_test/"),
        ([f"alphabet_train/alphabet_train/{CD}", f"alphabet_test/alphabet_test/{CD}"],
         "cats dogs", (6, 0, 6), "alphabet_test/alphabet_test/"),
        ([f"Training/{CD}", f"Test/{CD}", "test-multiple_fruits/3*.jpg"], "cats dogs", (6, 0, 6), "Test/"),
        (["{train,val,test}/{NORMAL,PNEUMONIA}/3*.jpeg", "chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/3*.jpeg",
          "__MACOSX/train/NORMAL/3*.jpeg"], "NORMAL PNEUMONIA", (6, 6, 6), "test/"),
        (["train/{1,10}/3*.jpg", "valid/{1,10}/3*.jpg", "cat_to_name.json"], "1 10", (6, 0, 6), "valid/"),
        # Other spellings
        *(([f"{train}/{CD}", f"{val}/{CD}"], "cats dogs", (6, 0, 6), f"{val}/")
          for train, val in [("train", "dev"), ("TRAIN", "EVAL"), ("trainset", "valset"), ("train_images", "val_img"),
                             ("Training Data", "Validation Data"), ("train2017", "val2017"), ("训练集", "测试集"),
                             ("train-set", "hold-out"), ("1_train", "2_test"), ("images_train", "images_development")]),
        ([f"ISIC_2018_Training_Input/{CD}", f"ISIC_2018_Test_Input/{CD}"],
         "cats dogs", (6, 0, 6), "ISIC_2018_Test_Input/"),
        # ImageNet and Tiny-ImageNet after their validation images are sorted
        (["train/{n01440764,n01443537}/images/3*.JPEG", "train/{n01440764,n01443537}/boxes.txt",
          "val/{n01440764,n01443537}/3*.JPEG", "test/3*.JPEG"], "n01440764 n01443537", (6, 0, 6), "val/"),
        # Class folders alone: EuroSAT, classes that are named like a split, classes with subfolders
        (["{Forest,River}/3*.jpg", "{train,test,validation}.csv", "label_map.json"], "Forest River", (4, 0, 2), MADE),
        (["{bus,train,car}/3*.jpg"], "bus car train", (5, 0, 4), MADE),
        (["{bus,train}/3*.jpg", "train/steam/3*.jpg"], "bus train", (5, 0, 4), MADE),
        (["{valid,invalid}/3*.jpg"], "invalid valid", (4, 0, 2), MADE),
        (["{cats,dogs}/{2020,2021-05-03}/3*.jpg"], "cats dogs", (7, 0, 5), MADE),
        (["{cats,dogs}/{video_1,video_2}/3*.jpg"], "cats dogs", (7, 0, 5), MADE),
        (["train_station/{day,night}/3*.jpg", "airport/{gate,hall}/3*.jpg", "harbor/{boat,ship}/3*.jpg"],
         "airport harbor train_station", (11, 0, 7), MADE),
        (["{1,-1,face,face_mask}/3*.jpg", "1/2/3*.jpg"], "-1 1 face face_mask", (9, 0, 6), MADE),
        # Junk of storage devices and regraft's output
        ([CD, "{cats,dogs}/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "cats/{.thumbnails,.ipynb_checkpoints}/0.jpg",
          "dogs/SYNOPHOTO_THUMB_XL.jpg", "{$RECYCLE.BIN,lost+found,@eaDir,#recycle}/3*.jpg", "cats/._0.jpg"],
         "cats dogs", (4, 0, 2), MADE),
        ([CD, "runs/{default,two}/preview.png"], "cats dogs", (4, 0, 2), MADE),
        ([CD, "env/{pyvenv.cfg,bin/python,share/logo.png}", "web/node_modules/3*.png"], "cats dogs", (4, 0, 2), MADE),
        ([CD, "runs/a/b/{attempts/0001.json,x.png}", "cats/mine/{x.png,.regraft}"], "cats dogs", (4, 0, 2), MADE),
        ([f"train/{CD}", f"val/{CD}", "train/runs/default/{preview.png,.regraft}"], "cats dogs", (6, 0, 6), "val/"),
        # Folders without images are no classes
        ([CD, "docs/{readme.md,paper.pdf}", "labels/3*.txt", "empty/.keep"], "cats dogs", (4, 0, 2), MADE),
        ([f"train/{CD}", f"val/{CD}", "val/{birds,dogs}/.keep", "train/birds/.keep"], "cats dogs", (6, 0, 6), "val/"),
    ],
)  # fmt: skip
def test_layout_is_read(
    tmp_path: Path, patterns: list[str], classes: str, sizes: tuple[int, ...], reported: str
) -> None:
    index = read(build(tmp_path, *patterns))
    assert list(index.classes) == classes.split()
    assert (len(index.train), len(index.val), len(index.test)) == sizes
    assert index.reported == reported
    assert reported in {MADE, "val/", "test/"} or any(f" is {reported}" in note for note in index.notes)
    assert not {"preview.png", "x.png"} & {Path(path).name for path, _ in (*index.train, *index.test)}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        # Folds, domains, color variants: PACS, Office-Home, PlantVillage, EuroSAT
        ([f"{{fold_0,fold_1}}/{CD}"], r"fold_0/ and fold_1/ hold folders of the same names.*\n  fold_0/: 6 images in 2 "
         r"folders \(cats, dogs\)\n.*data\.train_dir, data\.val_dir and data\.test_dir.*--data\.root .*/fold_0"),
        (["{photo,sketch}/{dog,horse,house}/3*.jpg", "art/{dog,horse}/3*.jpg"], r"parts.*photo/: 9.*data\.train_dir"),
        (["{color,grayscale,segmented}/{Apple___rust,Apple___scab}/3*.jpg"], r"data\.root .*/color"),
        (["EuroSAT/{Forest,River}/3*.jpg", "EuroSATallBands/{Forest,River}/3*.tif"], r"parts of a dataset"),
        ([f"train/{{photo,sketch}}/{CD}", f"test/{{photo,sketch}}/{CD}"], r"train: photo/ and sketch/ hold folders"),
        ([CD, f"PetImages/{CD}"], r"PetImages/ holds folders of the same names as the folders beside it.*copy"),
        (["{cats,dogs}/{train,test}/3*.jpg"], "holds folders of splits.*cats/: 6 images in 2 .*a CSV with"),
        ([f"casting/{{train,test}}/{CD}", f"large/{CD}"], r"casting/ holds folders of splits \(test, train\)"),
        ([f"archive/train/{CD}", "pictures/3*.jpg"], r"archive/ holds folders of splits \(train\).*--data\.root"),
        ([f"train/{CD}", f"extra/{CD}"], r"extra/ holds the class folders of train/.*data\.train_dir.*data\.test_dir"),
        # Leftovers: copies, masks, folders at the wrong place or without a name
        *(([CD, f"{name}/3*.jpg"], rf"{re.escape(name)}/ looks like a copy of cats/.*set data\.train_dir to '\.'")
          for name in ("cats - Copy", "cats (1)", "Copy of cats", "Cats_backup", "cats.old", "cats~", "cats_aug")),
        (["train/{cats,cats copy,dogs}/3*.jpg", f"val/{CD}"], "a copy of cats/.*train_dir to 'train', and data.val"),
        ([CD, "dogs/Cats/3*.jpg"], "dogs/Cats/ has the name of the class cats/, but its images would be of class dogs"),
        ([CD, "cats/cats/3*.jpg"], "cats/cats/ has the name of the class cats/"),
        ([CD, "New folder (2)/3*.jpg"], "has the name of a new folder"),
        ([CD, "Ground_Truth/3*.png"], "Ground_Truth/ looks like masks or labels"),
        (["ISIC_Training_Data/3*.jpg", "ISIC_Training_GroundTruth/3*.png"], "GroundTruth/ looks like masks"),
        (["ISIC_2018_Training_Input/3*.jpg", "ISIC_2018_Test_Input/3*.jpg"], "look like splits of a dataset"),
        ([CD, "docs/images/3*.png"], "docs/ looks like a folder of a project"),
        ([CD, "{cats,dogs}/masks/3*.png"], "cats/masks/ looks like masks or labels"),
        ([CD, "cats/3*_mask_1.png"], "cats/ holds 3 files named as masks of other images, such as 0_mask_1.png"),
        ([CD, "test/3*.jpg"], "test/ looks like a split of a dataset without class folders"),
        ([CD, "val_images/images/3*.jpg"], "val_images/ looks like a split of a dataset without"),
        # Images without labels, beside a CSV or not: APTOS, dog breeds, HAM10000, ImageNet, Roboflow, NIH
        (["{train_images,test_images}/3*.png"], r"test_images/, train_images/ look like splits.*CSV.*data\.csv_root"),
        (["{train,test}/3*.jpg", "labels.csv"], r"--data\.root .*/labels\.csv --data\.csv_root .*/train, with"),
        (["HAM10000_images_part_{1,2}/3*.jpg", "HAM10000_metadata.csv"], r"parts.*/HAM10000_metadata\.csv"),
        (["images_{001,002}/images/3*.png"], "look like parts of a dataset"),
        (["images/3*.jpg", "labels.csv"], r"single folder with images, images/.*--data\.csv_root .*/images"),
        (["3*.jpg", "labels.csv"], r"3 images and no folders.*--data\.root .*/labels\.csv"),
        (["train/{a,b}/3*.JPEG", "val/3*.JPEG"], r"val: it has no class folders, so its 3 files.*data\.val_dir"),
        (["train/{a,b}/images/3*.JPEG", "val/images/3*.JPEG", "val/val_annotations.txt"], "val/images: it has no"),
        (["{train,valid,test}/3*.jpg", "{train,valid,test}/_classes.csv"], r"--data\.root .*/train/_classes\.csv"),
        (["{images,masks}/3*.png"], "look like images and their masks"),
        (["train/{images,labels}/3*.png", "val/{images,labels}/3*.png"], "train: the folders look like images and"),
        ([f"my_train/{CD}", "pred/3*.jpg"], r"my_train/ looks like a split of a dataset \(train\).*data\.train_dir"),
        (["{trainA,trainB,testA,testB}/3*.jpg"], "testA/, testB/, trainA/, trainB/ look like splits"),
        (["Train/{0,1}/3*.png", "{Test,Meta}/3*.png", "{Meta,Test,Train}.csv"],
         r"Test: it has no class folders.*--data\.root .*/Test\.csv"),
        (["COVID/{images,masks}/3*.png", "Normal/{images,masks}/3*.png"], r"COVID/masks/ looks like masks"),
        (["{images,annotations/trimaps}/3*.png", "annotations/list.txt"], "look like images and their masks"),
        (["{train,test,bus}/3*.jpg"], r"test/, train/ look like splits.*.*set data\.train_dir to '\.'"),
        # Folders around the dataset: CUB, Stanford Dogs, doubled folders
        (["CUB/images/{001.Albatross,002.Auk}/3*.jpg"], "--data.root .*/CUB/images$"),
        (["images/{001.Albatross,002.Auk}/3*.jpg", "{attributes,parts}/x.txt"], "--data.root .*/images$"),
        (["images/Images/{n02-Pug,n03-Chow}/3*.jpg", "annotations/{n02-Pug,n03-Chow}/n02_1"], "annotations/ holds"),
        ([f"data/data/{CD}"], "--data.root .*/data/data$"),
        ([f"train/animals/{CD}", f"test/animals/{CD}"], "train: holds a single .*, animals/.*data.train_dir to "),
        # One split or class twice
        ([f"{{train,val,dev}}/{CD}"], "(val/ and dev|dev/ and val)/ are the same split, val"),
        ([f"{{train,training_set}}/{CD}"], "are the same split, train"),
        # Classes that a person reads as equal
        (["{cat,cat ,dog}/3*.jpg"], "'cat' and 'cat ' differ only in spaces"),
        (["{Cat,cat,dog}/3*.jpg"], "'Cat' and 'cat' differ only in upper and lower case"),
        (["{caf\u00e9,cafe\u0301,dog}/3*.jpg"], r"'cafe\\u0301' and 'caf\\xe9' differ only in the Unicode encoding"),
        (["{caf\u00e9,Cafe\u0301 ,dog}/3*.jpg"], "differ only in spaces, case or"),
        (["{my cat,my\u00a0cat,dog}/3*.jpg"], r"'my cat' and 'my\\xa0cat' differ only in invisible characters"),
        (["{cat,c\u200bat,dog}/3*.jpg"], "differ only in invisible characters"),
        (["{cat,\u0441\u0430t,dog}/3*.jpg"], "look the same"),
        (["{hot dog,hot_dog,pizza}/3*.jpg"], "differ only in spaces, hyphens and underscores"),
        (["{cat,ｃat,dog}/3*.jpg"], r"uff43at' differ only in .* look the same"),
        (["{1,01.0,2}/3*.jpg"], "differ only in how the number is written"),
        (["train/{cat,dog}/3*.jpg", "val/{Cat,dog}/3*.jpg"], "'Cat' and 'cat' differ only in upper"),
        # Folders without images where it matters
        (["{cats,dogs}/3*.jpg", "birds/3*.cr2"], "birds/ holds 3 .cr2.*data.extensions"),
        (["train/{a,b}/3*.jpg", "train/c/.keep", "test/{a,b,c}/3*.jpg"], "test/ has classes that are not .*: c"),
    ],
)  # fmt: skip
def test_ambiguous_layout_is_refused(tmp_path: Path, patterns: list[str], message: str) -> None:
    root = build(tmp_path / "root", *patterns)
    with pytest.raises(UserError, match=f"(?s){message}"):
        read(root)


def test_options_say_which_folder_is_which_split(tmp_path: Path) -> None:
    root = build(tmp_path / "root", f"fold_{{0,1,2}}/{CD}", f"extra/extra/{CD}")
    index = read(root, train="fold_1", val="fold_0", test=str(root / "extra"))
    assert [len(split) for split in (index.train, index.val, index.test)] == [6, 6, 6]
    assert all("fold_1" in path for path, _ in index.train)
    assert any("ignored: fold_2/" in note for note in index.notes)
    assert len(read(root, train="fold_1").test) == 2  # no other split is looked for
    assert read(root, train=".").classes == ("extra", "fold_0", "fold_1", "fold_2")
    beside = read(build(tmp_path / "beside", CD, f"exam/{CD}"), train=".", test="exam/")
    assert (beside.classes, len(beside.train), len(beside.test)) == (("cats", "dogs"), 6, 6)
    known = build(tmp_path / "known", f"{{train,test,other}}/{CD}")
    assert read(known, val="other").reported == "test/"
    for dirs, message in (
        ({"train": "fold_9"}, r"data\.train_dir is 'fold_9': there is no such folder in data\.root"),
        ({"train": "fold_0", "test": "./fold_0"}, "name the same folder"),
        ({"val": "fold_0"}, r"data\.val_dir is set, but there is no train/.*set data\.train_dir"),
    ):
        with pytest.raises(UserError, match=message):
            read(root, **dirs)
    with pytest.raises(UserError, match=r"a folder, but data\.csv_columns, csv_root and csv_suffix are for a CSV"):
        read_index(
            root, val_fraction=0, test_fraction=0.4, seed=0, extensions=(".jpg",), table=TableFormat(suffix=".j")
        )
    with pytest.raises(UserError, match=r"a file, but data\.train_dir and data\.val_dir need a folder"):
        read(build(tmp_path, "list.csv") / "list.csv", train="a", val="b")


def test_output_of_regraft_is_no_data(tmp_path: Path) -> None:
    root = build(tmp_path, CD, "run/{preview.png,notes/curves.png}", f"run/{ATTEMPTS}/0001.json", "old/curves.png")
    (root / "old" / CONFIG).write_text(CONFIG_HEADER + "run: {}")
    create_output_folder(root / "previews" / "first")
    build(root, "previews/first/animals.png", "mine/config.yaml", "mine/3*.png")
    index = read(root)
    assert index.classes == ("cats", "dogs", "mine")
    assert any("output folders of regraft ignored: old/, previews/, run/" in note for note in index.notes)
    # run.dir is the folder of the dataset
    build(root, f"{ATTEMPTS}/0001.json", "checkpoints/step/model.safetensors", "logs/plot.png", "earlier-1-x/model.png")
    assert read(root).classes == index.classes


def test_class_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    build(tmp_path, CD, "birds/3*.jpg", f"dogs/{ATTEMPTS}/0001.json", "dogs/curves.png")
    with pytest.raises(UserError, match=r"dogs: holds a run of regraft and 3 other images, such as 0\.jpg"):
        read(tmp_path)


def test_letters_may_differ_in_case(tmp_path: Path) -> None:
    assert read(build(tmp_path, "{A,a,B}/3*.jpg")).classes == ("A", "B", "a")
