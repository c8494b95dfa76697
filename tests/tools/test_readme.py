"""Every command and line of Python in the README and its first page, in order, at small sizes."""

import functools
import re
import shlex

import pytest
import torch

from equimini.sampling.image_generator import ImageGenerator
from tests.convert.test_convert import (HEADS, WINDOW, generator_file, random_generator,
                                        random_tokenizer, tokenizer_file)
from tests.evaluate.test_evaluate import TinyNet
from tests.helpers.scripts import ROOT, invoke

PAGES = ("README.md", "docs/your-pictures.md")
SHORT = "--steps 2 --batch-size 2 --val-images 2 --workers 0"
# what makes a command quick, added to its flags (the last one of two counts)
SMALL = {
    "train_tokenizer.py": f"{SHORT} --stats-images 2",
    "train_generator.py": f"{SHORT} --preview-steps 1",
    "sample.py": "--steps 1",
    "sample.py --scroll": "--steps 1 --scroll 40 --classes forest:20,sea:20",
    "equimini.show drift": "--columns 20 --count 2 --steps 1",
    "equimini.convert places_large.ckpt": f"--heads {HEADS} --window {WINDOW}",
    "equimini.evaluate generator": "--n 4 --steps 1 --workers 0 --val-fraction 0.5",
    "equimini.evaluate tokenizer": "--n 4 --workers 0 --val-fraction 0.5",
    "equimini.bench data": "--images 8 --workers 0",
    "equimini.bench attention": "--shape 1 8 2 16 4",
}
ELSEWHERE = ("tests.soak.kills",  # test_scripts.py calls it
             "equimini.page",  # serves until it is stopped; tests/page
             "pytest")  # this run


def commands(text: str) -> list[list[str]]:
    """The words of every `python …` command, in code blocks and between backticks."""
    blocks = re.findall(r"```bash\n(.*?)```|`(python [^`]+)`", text, re.DOTALL)
    lines = "\n".join(block.replace("\\\n", " ") or inline.replace("\n", " ")  # prose is wrapped
                      for block, inline in blocks)
    parts = [part.strip() for line in lines.splitlines() for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("python ")]


def quick(words: list[str]) -> list[str]:
    """The command with what makes it quick; a module as equimini.name instead of -m."""
    words = words[1:] if words[0] == "-m" else words
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in SMALL), None)
    return words + (SMALL[name].split() if name else [])


def test_commands_are_found():
    text = ("```bash\npython a.py \\\n  --x 'b c' && python -m d\nls\n```\n"
            "see `python -m e --cfg\n3`")
    assert commands(text) == [["a.py", "--x", "b c"], ["-m", "d"], ["-m", "e", "--cfg", "3"]]
    assert quick(["sample.py", "--steps", "9"])[-2:] == ["--steps", "1"]


@pytest.mark.slow
def test_every_command_of_the_pages_for_users(picture_folder, tmp_path, monkeypatch):
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    found = list(map(list, dict.fromkeys(map(tuple, commands(text)))))  # each one once
    assert {words[0] for words in found} >= {"train_tokenizer.py", "train_generator.py",
                                             "sample.py"}
    for name in ("my", "docs", "scenes/train", "scenes/val"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my/pictures").symlink_to(picture_folder)
    for split in ("train", "val"):
        for name in ("buildings", "forest", "glacier", "mountain", "sea", "street"):
            (tmp_path / "scenes" / split / name).symlink_to(picture_folder / "cat")
    torch.jit.script(TinyNet()).save(str(tmp_path / "inception-2015-12-05.pt"))
    (tmp_path / "my/photo.jpg").symlink_to(picture_folder / "cat" / "0.png")
    tokenizer_file(tmp_path / "tokenizer.ckpt", random_tokenizer())
    generator_file(tmp_path / "places_large.ckpt", random_generator(), random_generator(1))
    for words in found:
        if not any(name in words for name in ELSEWHERE):
            print("$ python", *words)  # shown if it fails
            invoke(*quick(words), cwd=tmp_path)
    monkeypatch.setattr(ImageGenerator, "sample",
                        functools.partialmethod(ImageGenerator.sample, steps=1))
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        print(code)
        exec(compile(code, "README.md", "exec"), {})
