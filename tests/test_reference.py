"""docs/methods.md is what the methods say of themselves."""

import contextlib
import re
from pathlib import Path

import pytest

from freemerge import cli, methods, reference

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_the_one_the_methods_make():
    assert (DOCS / "methods.md").read_text("utf-8") == reference.page(), (
        "print it anew: freemerge methods --markdown > docs/methods.md"
    )


def test_every_method_is_in_one_family():
    members = [name for family in reference.FAMILIES.values() for name in family]
    assert sorted(members) == methods.names()
    assert set(reference.INTRODUCTIONS) <= set(reference.FAMILIES)


def test_the_page_names_every_parameter_variant_and_paper():
    page = reference.page()
    for name in methods.names():
        method = methods.get(name)
        section = page.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
        assert method.summary in section
        assert all(f"`{parameter}`" in section for parameter in method.parameters), name
        assert all(f"`variant: {variant}`" in section for variant in method.variants), name
        assert reference.source(method) in section


def test_the_variants_of_the_filter_are_explained():
    text = (DOCS / "filter.md").read_text("utf-8")
    assert all(f"`{variant}`" in text for name in ("fr", "free") for variant in methods.get(name).variants)


def test_links_lead_to_pages_that_are_there():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8")):
            assert (DOCS / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize(("arguments", "first"), [([], "method "), (["--markdown"], "# Methods\n")])
def test_the_command_lists_the_methods_or_prints_the_page(monkeypatch, capsys, arguments, first):
    monkeypatch.setattr("sys.argv", ["freemerge", "methods", *arguments])
    with contextlib.suppress(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith(first)
