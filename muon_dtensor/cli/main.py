"""Entry point of the `muon-dtensor` command."""

import importlib.util
import sys

REQUIRED = ("rich", "tyro")


def main() -> None:
    """Run the subcommand in `sys.argv`. Exits with status 2 if it cannot run."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"muon-dtensor needs {', '.join(missing)}: pip install 'muon_dtensor[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if sys.argv[1:] == ["--version"]:
        raise SystemExit(version())
    import tyro

    from muon_dtensor.cli import train
    from muon_dtensor.cli.calibrate import calibrate
    from muon_dtensor.cli.demo import demo
    from muon_dtensor.cli.plan import plan
    from muon_dtensor.cli.validate import validate

    arguments = sys.argv[1:]
    if arguments[:1] in (["train"], ["evaluate"], ["export"]):
        try:
            arguments, train.overrides = train.split_overrides(arguments)
        except ValueError as error:
            print(f"muon-dtensor {arguments[0]}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    status = tyro.extras.subcommand_cli_from_dict(
        {
            "calibrate": calibrate,
            "demo": demo,
            "evaluate": train.evaluate,
            "export": train.export,
            "make-sample-data": train.make_sample_data,
            "plan": plan,
            "train": train.train,
            "validate": validate,
            "version": version,
        },
        prog="muon-dtensor",
        description="Sharding-aware Muon for PyTorch.",
        args=arguments,
    )
    raise SystemExit(status)


def version() -> int:
    """Print the versions of this package and of torch."""
    import torch

    from muon_dtensor import __version__

    print(f"muon_dtensor {__version__}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    main()
