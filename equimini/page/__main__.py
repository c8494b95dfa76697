"""A page to draw in, for the browser of this machine."""

from __future__ import annotations

import os
import signal
import sys
import webbrowser
from dataclasses import dataclass

from equimini import load_generator
from equimini.config import Checked, flag
from equimini.page.drawing import Studio
from equimini.page.server import Server
from equimini.utils.checkpoint import DRAWN_WITH
from equimini.utils.command_line import output_folder, parse, pick_device, run
from equimini.utils.errors import UserError, first_line
from equimini.utils.files import locked


@dataclass(frozen=True)
class PageConfig(Checked):
    """Where, and with which model."""

    checkpoint: str = flag(DRAWN_WITH, "checkpoint of a trained generator, or the name of a model in "
                           "the box: scenes-mean-flow, scenes")
    tokenizer: str = flag("", "checkpoint of the generator's tokenizer with a fine-tuned decoder")
    weights: str = flag("ema", "moving average of the weights, or the raw ones",
                        choices=("ema", "raw"))
    port: int = flag(8642, "of 127.0.0.1; 0: one that is free", min=0, max=65535)
    open: bool = flag(False, "show the page in the browser")
    out: str = flag("page", "folder of the strip and its history; what is there is shown again")
    device: str = flag("auto", "where to compute: auto, cpu, cuda, cuda:N, mps")


def main() -> None:
    cfg = parse("equimini.page", __doc__, PageConfig())
    device = pick_device(cfg.device)
    with locked(folder := output_folder(cfg.out)):
        model = load_generator(cfg.checkpoint, device, cfg.weights == "ema", cfg.tokenizer)
        studio = Studio(model, folder, cfg.checkpoint)
        try:
            server = Server(studio, cfg.port)
        except OSError as error:
            raise UserError(f"--port {cfg.port} cannot be used ({first_line(error)}); another page "
                            "may be running there; give another one, or 0") from None
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it; the strip is kept in "
              f"{folder})", flush=True)
        if cfg.open:
            webbrowser.open(f"http://127.0.0.1:{server.server_port}/")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.end()
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(130)  # Python itself would cut off threads that are within torch, and abort


if __name__ == "__main__":
    run(main)
