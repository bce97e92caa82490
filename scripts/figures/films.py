r"""A short GIF of each of some agents, from their run folders, small enough for a README.

    python scripts/figures/films.py runs/trpo-HalfCheetah-v5-s0-1 runs/trpo-Hopper-v5-s0-1 --out docs/results/films

Each shows the last agent (``--model best``: the best), with its most likely actions, at the speed of the simulation.
The file is called like the environment, in small letters. MuJoCo renders through EGL where there is no display, or as
the variable MUJOCO_GL says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from agents.evaluation import film
from agents.runs import RunFolder
from agents.training import MISTAKES, check_named
from envs.seeding import Purpose, purpose_seed
from npg.runs.files import replacing

#: GIFs count hundredths of a second, and browsers slow down what is faster than 20 frames per second or so.
FPS = 20


def write_gif(path: Path, frames: Sequence[npt.NDArray[np.uint8]], fps: float, width: int, colours: int) -> None:
    """Frames, scaled to a width, in one palette for all.

    Args:
        path: where to.
        frames: (height, width, 3) each.
        fps: of them.
        width: in pixels.
        colours: in the palette, at most 256.
    """
    images = [Image.fromarray(frame) for frame in frames]
    height = round(images[0].height * width / images[0].width)
    images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    strip = Image.new("RGB", (width, height * min(8, len(images))))  # the palette is of frames from all of the film
    for i, at in enumerate(np.linspace(0, len(images) - 1, min(8, len(images))).astype(int)):
        strip.paste(images[at], (0, i * height))
    palette = strip.quantize(colours)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        duration = 10 * round(100 / fps)
        first.save(partial, "GIF", save_all=True, append_images=others, duration=duration, loop=0, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN_DIR", type=Path, nargs="+", help="what train_agent.py left")
    add("--env", action="append", metavar="ENV_ID", default=[], help="needed for a run of MODULE:ID, which is imported")
    add("--out", type=Path, default=Path("docs/results/films"), metavar="DIR", help="[%(default)s]")
    add("--model", choices=("best", "last"), default="last", help="[%(default)s]")
    add("--seconds", type=float, default=5.0, metavar="S", help="how long [%(default)s]")
    add("--skip", type=float, default=0.0, metavar="S", help="of the beginning of the episode [%(default)s]")
    add("--width", type=int, default=200, metavar="PIXELS", help="[%(default)s]")
    add("--colours", type=int, default=64, metavar="N", help="fewer make a smaller file [%(default)s]")
    add("--seed", type=int, default=0, metavar="S", help="of the episode [%(default)s]")
    options = parser.parse_args(arguments)
    try:
        if not (options.seconds > 0 and options.skip >= 0):
            raise ValueError(f"--seconds must be above 0, and --skip at least 0; got {options.seconds}, {options.skip}")
        if options.width < 16 or not 2 <= options.colours <= 256:
            raise ValueError(f"--width must be at least 16, --colours 2 to 256; got {options.width}, {options.colours}")
        for run in options.runs:
            folder = RunFolder.open(run)
            algo, env = folder.config.algo, folder.config.env
            check_named(run, (algo, env), env=env if env in options.env else None, option="--env")
            seed = purpose_seed(options.seed, Purpose.EVALUATION_BY_HAND)
            agent = folder.best if options.model == "best" else folder.last
            span = {"begin": options.skip, "end": options.skip + options.seconds}
            frames, fps, episode = film(agent, folder.config, seed, fps=FPS, **span)
            if not frames:
                raise ValueError(f"--skip {options.skip} is beyond the end of {run}'s episode")
            path = options.out / f"{env.replace('/', '_').replace(':', '_').lower()}.gif"
            write_gif(path, frames, fps, options.width, options.colours)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, of an episode with return {episode.mean_return:.1f}")
    except MISTAKES as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
