"""Pack a folder of pictures small, to send it to a GPU machine: one zip per split, recompressed.

    python tests/gpu/pack_photos.py --data scenes --out runs/packed [--limit 39]
    python train_tokenizer.py --data runs/packed/train.zip --val-data runs/packed/val.zip …

The pictures become WebP of the highest quality with which all of them fit into --limit MiB; names
and classes stay.  --data holds the folders of the classes, or train and val with these in them.
(Cached latents are larger: 16 columns of 128 floats, for either mirror, are 16 KB a picture.)
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from equimini.utils.command_line import run  # noqa: E402
from equimini.utils.errors import UserError  # noqa: E402
from equimini.utils.files import replacing  # noqa: E402

QUALITIES = range(90, 9, -5)
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
HEADERS = 200  # bytes of a picture in a zip beside its own; a tar has 768, a fifth of a picture
SAMPLE = 100


def recompressed(path: Path, quality: int) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def quality_that_fits(paths: list[Path], limit: int) -> int:
    """The highest quality with which the pictures fit into `limit` bytes, told from a sample."""
    some = random.Random(0).sample(paths, min(SAMPLE, len(paths)))
    for quality in QUALITIES:
        size = sum(len(recompressed(path, quality)) for path in some) / len(some)
        if (1.03 * size + HEADERS) * len(paths) <= limit:  # 3 %: the sample's error
            return quality
    raise UserError(f"--limit: {len(paths)} pictures do not fit into {limit / 2**20:g} MiB at "
                    f"quality {QUALITIES[-1]}; raise it, or give fewer")


def pack(folder: Path, target: Path, quality: int) -> None:
    """The folder's pictures as a zip, with names below the folder."""
    with replacing(target) as file, zipfile.ZipFile(file, "w") as archive:
        for path in pictures(folder):
            archive.writestr(str(path.relative_to(folder).with_suffix(".webp")),
                             recompressed(path, quality))


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder of pictures, by class")
    parser.add_argument("--out", type=Path, required=True, help="where the tars go")
    parser.add_argument("--limit", type=float, default=39, help="MiB of all zips together [39]")
    options = parser.parse_args()
    splits = [options.data / name for name in ("train", "val") if (options.data / name).is_dir()]
    splits = splits or [options.data]
    paths = [path for split in splits for path in pictures(split)]
    if not paths:
        raise UserError(f"--data {options.data} holds no pictures")
    quality = quality_that_fits(paths, int(options.limit * 2**20))
    options.out.mkdir(parents=True, exist_ok=True)
    for split in splits:
        target = options.out / f"{split.name if len(splits) > 1 else 'train'}.zip"
        pack(split, target, quality)
        print(f"{target}: {len(pictures(split))} pictures, quality {quality}, "
              f"{target.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    run(main)
