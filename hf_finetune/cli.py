"""The command line: verbs over recipes and runs. Each imports what it needs when it runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_finetune.errors import FinetuneError, Interrupted, UserError, did_you_mean
from hf_finetune.host import leave, quick_imports

# typer carries its own copy of click or uses click itself, by version; the base of its usage errors is this class.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="hf-finetune",
    help="Fine-tune any timm or transformers backbone from one short recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Changes to the recipe: a.b=value, a.b= for null, ~a.b to remove."
    ),
]
Output = Annotated[str | None, typer.Option(help="The run folder; default runs/<recipe>-<backbone>-<time>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the folder, or the newest one.")]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Resume although something differs that changes the result.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    allow_changes: AllowChanges = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe in this process; for several, `accelerate launch scripts/train.py --recipe RECIPE`."""
    run_recipe(
        recipe, overrides or [], output=output, resume=resume, allow_changes=allow_changes, quiet=quiet
    )


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Say what is wrong with a recipe, all of it, without loading data or model."""
    from hf_finetune.recipe import load_recipe

    load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: nothing wrong")


@app.command()
def explain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder for augment.png.")] = Path(),
) -> None:
    """Print the plan before any training: layers, rates, phases, weights loaded, steps, memory and time."""
    from hf_finetune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_finetune.explain import explain_recipe

    explain_recipe(loaded, output)


@app.command()
def recipes(
    action: Annotated[
        str | None, typer.Argument(metavar="[copy]", help="`copy` to get one as a file.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="Which one to copy.")] = None,
    to: Annotated[Path, typer.Option(help="Folder to copy to.")] = Path(),
) -> None:
    """List the shipped recipes, or copy one to change it."""
    from hf_finetune.recipe import shipped_recipes

    shipped = shipped_recipes()
    if action is None:
        width = max(map(len, shipped))
        for each, found in shipped.items():
            typer.echo(f"{each:<{width}}  {found.purpose}")
        return
    if action != "copy" or name is None:
        raise UserError(
            "recipes: write `hf-finetune recipes` for the list or `hf-finetune recipes copy NAME`."
        )
    if name not in shipped:
        raise UserError(
            f"recipes: there is no '{name}'.{did_you_mean(name, shipped)} There are {', '.join(shipped)}."
        )
    target = to / f"{name}.yaml"
    if target.exists():
        raise UserError(f"{target}: exists already. Remove it, or choose another folder with --to.")
    # The base comes along as a shipped name, so the copy stands alone in any folder.
    to.mkdir(parents=True, exist_ok=True)
    target.write_text(shipped[name].path.read_text(encoding="utf-8").replace("extends: base.yaml", "extends: base"),
                      encoding="utf-8")  # fmt: skip
    typer.echo(f"{target}")


@app.command()
def evaluate(
    run: Annotated[
        str, typer.Argument(metavar="RUN|REPO", help="A run folder, a model folder or a Hub repository.")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[data=… split=…]")] = None,
) -> None:
    """Measure a run's model on a split: by default the validation split of the data it was trained with."""
    from hf_finetune.inference import evaluate_model

    evaluate_model(run, options or [])


@app.command()
def predict(
    run: Annotated[
        str, typer.Argument(metavar="RUN|REPO", help="A run folder, a model folder or a Hub repository.")
    ],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images or folders of them; texts or files.")
    ],
    form: Annotated[str, typer.Option("--format", help="table, csv or jsonl.")] = "table",
    top: Annotated[int, typer.Option(min=1, help="Labels per input.")] = 1,
) -> None:
    """Predict labels for images (files, folders) or texts (given as words, or .txt/.csv/.jsonl files)."""
    from hf_finetune.inference import predict_inputs

    predict_inputs(run, inputs, form=form, top=top)


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN|REPO", help="A run folder, a model folder or a Hub repository.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[data=… split=…]", help="Samples to check with, where the run's own are gone."
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="onnx or torch.")] = "onnx",
    output: Annotated[
        str | None, typer.Option(help="Folder to write to; default export/ in the run's folder.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(min=18, help="Opset of ONNX; default what torch writes.")
    ] = None,
) -> None:
    """Write a trained model for other runtimes, as ONNX or torch.export, and check it on real samples."""
    from hf_finetune.export import check_request, export_model

    check_request(form, opset)
    from hf_finetune.trained import load_trained

    export_model(run, load_trained(run), form=form, output=output, opset=opset, options=options or [])


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to push to; made when it is not there.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit.")] = None,
    message: Annotated[
        str | None, typer.Option(help="Commit message; default what the model measured.")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", help="Push a demo as well, the Gradio Space REPO_ID-demo.")
    ] = False,
    space_id: Annotated[str | None, typer.Option(help="Another name for the Space.")] = None,
) -> None:
    """Push a run's best model to the Hub."""
    from hf_finetune.hub.push import Order, push_run

    order = Order(repo_id, private, branch, pr, tag, message, space, space_id)
    for address in push_run(run, order, say=_note):
        typer.echo(f"pushed: {address}")


@app.command()
def cache(
    action: Annotated[
        str, typer.Argument(metavar="list|prune", help="Show what is kept, or remove some of it.")
    ] = "list",
    keep: Annotated[
        str, typer.Option(help="With prune: how much stays, what was used last first, e.g. 10GB.")
    ] = "0",
) -> None:
    """List or prune what frozen layers have computed: it is kept for later runs (HF_FINETUNE_CACHE says where)."""
    from hf_finetune.features import disk
    from hf_finetune.spec import Size, parse_size

    if action not in ("list", "prune"):
        raise UserError(
            f"cache: '{action}' is neither list nor prune.{did_you_mean(action, ('list', 'prune'))}"
        )
    try:
        left = 0 if keep == "0" else parse_size(keep).bytes
    except ValueError as error:
        raise UserError(f"--keep: {error}.") from None
    shown = disk.kept() if action == "list" else disk.prune(left)
    for each in shown:
        typer.echo(f"{each.folder.name[:12]}  {Size(each.size)!s:>9}  {each.rows:>9,} rows  {each.what}")
    verb = "kept" if action == "list" else "removed"
    typer.echo(f"{len(shown)} {verb}, {Size(sum(each.size for each in shown))}, in {disk.features_folder()}")


@app.command()
def compare(
    arms: Annotated[list[str], typer.Argument(metavar="RECIPE...|RUN... [KEY=VALUE]...")],
    output: Annotated[Path | None, typer.Option(help="Folder for the runs and compare.png.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, with seeds 0 to N-1.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Run recipes with shared overrides, or take finished runs, and show them side by side."""
    from hf_finetune.compare import compare_arms

    compare_arms(arms, output=output, seeds=seeds, quiet=quiet)


def run_recipe(
    recipe: str, overrides: list[str], *, output: str | None, resume: bool, allow_changes: bool, quiet: bool
) -> None:
    """Load a recipe and run it; what the `train` verb and scripts/train.py share."""
    from hf_finetune.recipe import load_recipe

    run_folder = Path(recipe).parent if Path(recipe).name == "recipe.yaml" else Path(recipe)
    if resume and _is_run(run_folder):
        # A run is resumed by its folder, or the recipe in it, as well.
        recipe, output = str(run_folder / "recipe.yaml"), output or str(run_folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with quick_imports():
            from hf_finetune.setup import process_state
            from hf_finetune.together import together

        process_state()
        loaded = together(lambda: load_recipe(recipe, overrides))
    else:
        loaded = load_recipe(recipe, overrides)
    if output is not None:
        loaded = loaded.model_copy(update={"output": output})
    if loaded.training.reload_check and _rank() == 0:
        from hf_finetune.hub.fresh import fork_off

        with quick_imports():
            fork_off("torch", "torchvision", "safetensors.torch")
    with quick_imports():
        from hf_finetune.train import finetune

    # Until the loop watches for it, SIGTERM ends the run as SIGINT does: there is nothing to save yet.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = finetune(loaded, name=loaded.name, quiet=quiet, resume=resume, allow_changes=allow_changes)
    if not quiet and _rank() == 0:
        best = run.best
        found = (
            f"best {best['metric']} {best['value']:.4f} at epoch {best['epoch']:g}"
            if best
            else "nothing measured"
        )
        memory = (
            f"; {used['peak'] / 1e9:.3g} GB of memory at most" if (used := run.status.get("memory")) else ""
        )
        typer.echo(f"done: {found}; {run.status['why']}{memory}; {run.path}")


def main(arguments: list[str] | None = None, *, command: Any = None) -> None:
    """Run the command line; errors we can name end in one short text and their exit code."""
    try:
        code = (command or typer.main.get_command(app)).main(arguments, prog_name=None, standalone_mode=False)
        if isinstance(code, int) and code:  # what typer makes of a Ctrl-C that nobody caught
            sys.exit(code)
    except FinetuneError as error:
        _leave(error, error.exit_code, silent=error.told)
    except _ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _leave("interrupted", Interrupted.exit_code)


def run() -> None:
    """Entry of `hf-finetune`: `main`, and the end of the process."""
    leave(_code_of(main))


def train_script() -> None:
    """Entry of scripts/train.py: `--recipe RECIPE [KEY=VALUE …] [--output DIR]`."""

    def script(
        recipe: Annotated[str, typer.Option(help="A recipe file, or a shipped recipe's name.")],
        overrides: Overrides = None,
        output: Output = None,
        resume: Resume = False,
        allow_changes: AllowChanges = False,
        quiet: Quiet = False,
    ) -> None:
        """Run a recipe in every process that `accelerate launch` or `torchrun` started."""
        run_recipe(
            recipe, overrides or [], output=output, resume=resume, allow_changes=allow_changes, quiet=quiet
        )

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command()(script)
    leave(_code_of(lambda: main(command=typer.main.get_command(single))))


def _code_of(call: Callable[[], None]) -> int:
    try:
        call()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file()


def _note(text: str) -> None:
    """Say something that is not the answer."""
    sys.stderr.write(f"{text}\n")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _leave(error: object, code: int, *, silent: bool = False) -> None:
    if not silent:
        sys.stderr.write(f"error: {error}\n")
    sys.exit(code)
