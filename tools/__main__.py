"""What makes the repository: `python -m tools build`, check, refresh, back, kaggle and so on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dlia_utils import execute
from dlia_utils.files import error_text

from . import notebooks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 fine, 1 something failed, 2 wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m tools", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = {}
    for command in (build, check, refresh, back, kaggle_build, tables, body):
        name = command.__name__.removesuffix("_build")
        one = commands.add_parser(name, help=command.__doc__)
        one.set_defaults(command=command)
        add[name] = one.add_argument
    for name in ("build", "check", "refresh"):
        add[name]("nb", nargs="*", metavar="NN", help="which notebooks (default: all)")
    add["back"]("path", metavar="FILE", help="e.g. the notebook downloaded from Kaggle")
    option, out = add["kaggle"], "replaced whole (default: %(default)s)"
    option("--user", required=True, metavar="NAME", help="your Kaggle user name")
    option("--out", default="build/kaggle", metavar="DIR", help=out)
    option("--captum", metavar="FILE", help="captum's wheel (default: pip fetches it)")
    option("--strict", action="store_true", help="fail without captum's wheel")
    option("--offline", action="store_true", help="switch the internet off in the notebooks")
    joined = "competitions you have joined, to attach"
    option("--competition", nargs="+", default=[], metavar="SLUG", help=joined)
    options = parser.parse_args(arguments)
    try:
        return options.command(options) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error_text(error)}", file=sys.stderr)
        return 2


def build(options: argparse.Namespace) -> None:
    """turn notebooks/src/*.py into .ipynb; unchanged cells keep their outputs"""
    for source in notebooks.sources(options.nb):
        path = notebooks.write(notebooks.build(source), notebooks.product(source))
        print(f"built {execute.short(path)}")


def check(options: argparse.Namespace) -> int:
    """find static faults of the notebooks, broken links of the pages"""
    found = notebooks.sources(options.nb)
    problems = [f"{one.stem}: {problem}" for one in found for problem in notebooks.check(one)]
    problems += [] if options.nb else [*notebooks.orphans(), *notebooks.page_problems()]
    print("\n".join(problems) or f"{len(found)} notebook(s) without fault")
    return int(bool(problems))


def refresh(options: argparse.Namespace) -> int:
    """build, execute in the smoke profile on synthetic data, clean"""
    for source in notebooks.sources(options.nb):
        print(f"{source.stem}: executing in the smoke profile on synthetic data", flush=True)
        path = notebooks.refresh(source)
        print(f"wrote {execute.short(path)} ({path.stat().st_size / 1e3:.0f} kB)")
    return check(options)


def back(options: argparse.Namespace) -> None:
    """turn an edited NN_name.ipynb into its source again"""
    source = notebooks.back(options.path)
    print(f"wrote {execute.short(source)}; now rebuild: python -m tools refresh {source.stem[:2]}")


def kaggle_build(options: argparse.Namespace) -> None:
    """write the kernel folders and the offline data set"""
    from . import kaggle

    chosen = {"out": options.out, "captum": options.captum, "strict": options.strict}
    chosen |= {"internet": not options.offline, "competitions": options.competition}
    built = kaggle.build(options.user, **chosen)
    names = ", ".join(built.files)
    print(f"built {execute.short(built.folder)}: {len(built.kernels)} kernel(s), data set {names}")
    for note in built.notes:
        print(f"note: {note}")
    # The client imports six without asking for it.
    setup = "python -m pip install kaggle six; once: kaggle auth login"
    print(f"\nPush with Kaggle's client ({setup}), in this order:")
    for command, what in kaggle.push_commands(built):
        print(f"\n  # {what}\n  {command}")


def tables(options: argparse.Namespace) -> None:
    """write anew what is made from data: tables, pictures, the package's map"""
    from . import house, published

    published.write()
    house.draw()


def body(options: argparse.Namespace) -> None:
    """learn the small body of the smoke profile anew from phantom images (ten minutes)"""
    from . import body as small

    print(f"wrote {execute.short(small.make())}")


if __name__ == "__main__":
    sys.exit(main())
