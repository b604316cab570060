"""What the pages say is so: commands, recipes, links, the table of keys."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from hf_finetune.cli import app, main
from hf_finetune.recipe import dump_recipe, load_recipe, parse_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_finetune"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Return the commands a page shows, one for each line and each side of `&&`, without `NAME=value` in front."""
    found = []
    for line in "\n".join(blocks(text_of(page), "bash")).splitlines():
        for part in line.partition(" #")[0].split("&&"):
            words = shlex.split(part)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


ALL_COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
OURS = [words for _, words in ALL_COMMANDS if words[0] == "hf-finetune"]
SCRIPTS = [words for _, words in ALL_COMMANDS if "scripts/train.py" in words]


def positional(words: list[str]) -> list[str]:
    """Return the arguments that are neither options nor their values."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--"):
            kept.append(word)
        skip = word in {"--output", "--top", "--format", "--seeds", "--to", "--num_processes"}
    return kept


def is_override(word: str) -> bool:
    return "=" in word or word.startswith("~")


def recipes_of(words: list[str]) -> list[str]:
    """Return the recipes that a command of ours names."""
    if "scripts/train.py" in words:
        return [words[words.index("--recipe") + 1]]
    verb, *arguments = positional(words[1:])
    if verb == "compare":
        return [each for each in arguments if not is_override(each)]
    return arguments[:1] if verb in {"train", "check", "explain"} else []


def test_the_first_block_holds_the_two_commands_that_ci_runs() -> None:
    first = next(iter(re.findall(r"^```.*?\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)))
    train, test = first.splitlines()
    assert train.startswith("pip install -e . && accelerate launch scripts/train.py --recipe recipes/")
    assert test == 'pip install -e ".[test]" && pytest'
    assert README[: README.index("```")].count("\n") < 12, "they stand on the first screen"


@pytest.mark.parametrize("words", OURS + SCRIPTS, ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    names = recipes_of(words)
    overrides = [word for word in words if is_override(word) and not word.startswith("--")]
    if words[0] == "hf-finetune":
        assert words[1] in VERBS
    for name in names:
        if name.startswith("runs/"):
            continue  # a run that is resumed by its folder
        load_recipe(ROOT / name if name.endswith(".yaml") else name, overrides)


def test_there_are_commands_to_test() -> None:
    assert len(OURS) > 8
    assert len(SCRIPTS) > 2


def test_errors_look_as_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = blocks(README, "console")
    command, _, expected = block.partition("\n")
    with pytest.raises(SystemExit) as end:
        main(shlex.split(command.removeprefix("$ hf-finetune ")))
    assert end.value.code == 2
    assert capsys.readouterr().err == expected


def recipe_blocks() -> list[tuple[str, str]]:
    """Return every YAML block, one for each alternative that a block lists."""
    found = []
    for page in PAGES:
        for block in blocks(text_of(page), "yaml"):
            lines = block.splitlines()
            single = all(line.startswith("strategy: ") for line in lines)
            found += [(page, text) for text in (lines if single else [block])]
    return found


@pytest.mark.parametrize(("page", "text"), recipe_blocks(), ids=lambda value: value.splitlines()[0])
def test_a_recipe_loads(page: str, text: str) -> None:
    loaded = parse_recipe(yaml.safe_load(text))
    assert parse_recipe(yaml.safe_load(dump_recipe(loaded))) == loaded, (
        "written out in full it is the same recipe"
    )


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for target in targets:
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = text_of(page)
    for name in re.findall(r"\brecipes/(\w+)\.yaml", text):
        assert (ROOT / "recipes" / f"{name}.yaml").is_file() or name == "mine", name
    for verb in re.findall(r"`hf-finetune ([a-z][a-z-]*)", text):
        assert verb in VERBS, verb
    for file in re.findall(r"`((?:tests|scripts|docs|hf_finetune)/[\w./]+\.\w+)`", text):
        assert (ROOT / file).exists() or "mine" in file, file


@pytest.mark.parametrize("page", ["README.md", "docs/strategies.md"])
def test_every_shipped_recipe_is_described(page: str) -> None:
    missing = [name for name in shipped_recipes() if f"`{name}`" not in text_of(page)]
    assert not missing


def test_every_verb_is_in_the_readme() -> None:
    assert set(re.findall(r"^\| `hf-finetune ([a-z-]+)", README, flags=re.MULTILINE)) == VERBS


def test_the_architecture_names_what_exists() -> None:
    text = text_of("docs/architecture.md")
    for module, function in re.findall(r"`([a-z_.]+)\.(\w+)(?:\(\))?`", text):
        path = PACKAGE / f"{module.replace('.', '/')}.py"
        if path.is_file() and function != "py":
            source = path.read_text(encoding="utf-8")
            assert re.search(rf"^(def |class )?{function}\b", source, re.MULTILINE), f"{module}.{function}"
    house = text.partition("## The house")[2].partition("## The way")[0]
    unnamed = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
        and path.parent.name not in {"strategies", "shipped"}
        and path.name not in house
    ]
    assert not unnamed, "docs/architecture.md: say in one line what these are for"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "recipe_reference", ROOT / "scripts" / "recipe_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_keys_is_what_the_specs_say(reference: ModuleType) -> None:
    assert text_of("docs/recipes.md") == reference.page(), "run `python scripts/recipe_reference.py`"


def test_every_key_has_a_meaning(reference: ModuleType) -> None:
    rows = [line for line in reference.page().splitlines() if re.match(r"\| `", line)]
    assert len(rows) > 80
    assert not [row for row in rows if row.endswith("|  |")]


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "docs").glob("*.png"))
