"""Documentation strings as a data set: what is taken, what is left out, and that it is the same each time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simlm.data.datasets import find_splits, guess_sizes, open_dataset, signature
from simlm.data.formats import BadRecords
from simlm.data.python_docs import collect, split_docstring, versions
from simlm.errors import DataError
from simlm.recipe import DataSettings

BODY = "This body has to be long enough to count as a passage, so it goes on for a few more words{}."


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package with public and private parts."""
    root = tmp_path / "orchard"
    (root / "tests").mkdir(parents=True)
    files = {
        "__init__.py": "from ._trees import Pear, plum\nfrom ._bushes import *\n",
        "_trees.py": f'''
class Pear:
    """Hold the facts about one pear.

    {BODY.format(" one")}
    """
    def ripen(self):
        """Let the pear become soft and sweet.

        {BODY.format(" two")}
        """
    def _rot(self):
        """Nobody should read this private text.

        {BODY.format(" three")}
        """
def plum():
    """Return a plum from the tree. It is blue.

    {BODY.format(" four")}
    """
def hidden():
    """This one is not exported by the package.

    {BODY.format(" five")}
    """
''',
        "_bushes.py": f'''
__all__ = ["currant"]
def currant():
    """Return a currant from the bush.

    {BODY.format(" six")}
    """
def thorn():
    """Return a thorn which is not in the list.

    {BODY.format(" seven")}
    """
''',
        "tools.py": f'''
if True:
    def rake():
        """Short.

        {BODY.format(" eight")}
        """
def spade():
    """The same summary for two tools.

    {BODY.format(" nine")}
    """
def shovel():
    """The same summary, for two tools

    {BODY.format(" ten")}
    """
def twin_of_shovel():
    """Another name for the very same text.

    {BODY.format(" ten")}
    """
def brief():
    """Has next to no body at all.

    Indeed.
    """
add_newdoc("orchard.tools", "ladder", """
    ladder(height)

    Climb up into the crown of a tree.

    {BODY.format(" eleven")}
    """)
''',
        "broken.py": "def (:\n",
        "tests/test_it.py": f'def helper():\n    """A helper of the tests of the package.\n\n    {BODY}\n    """\n',
    }
    for name, text in files.items():
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "orchard"


def test_public_names_and_nothing_else(package: str) -> None:
    found = collect([package])
    names = [passage.name for passage in found.passages]
    assert sorted(names) == [
        "orchard.Pear",
        "orchard.Pear.ripen",
        "orchard.currant",
        "orchard.plum",
        "orchard.tools.ladder",
        "orchard.tools.rake",
        "orchard.tools.shovel",
        "orchard.tools.spade",
    ]
    queries = {found.passages[position].name for position in found.queries}
    # Too short a summary, and one that two objects share, are no queries; their passages stay.
    assert queries == set(names) - {"orchard.tools.rake", "orchard.tools.shovel", "orchard.tools.spade"}
    assert found.dropped == {"short body": 1, "repeated body": 1, "summary unfit as query": 1, "shared summary": 2}
    assert found.per_package == {"orchard": 8}
    plum = next(passage for passage in found.passages if passage.name == "orchard.plum")
    assert plum.summary == "Return a plum from the tree."
    assert plum.body == "It is blue.\n" + BODY.format(" four")
    ladder = next(passage for passage in found.passages if passage.name == "orchard.tools.ladder")
    assert ladder.summary == "Climb up into the crown of a tree."


def test_processes_change_nothing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = collect([package], num_workers=1)
    monkeypatch.setattr("simlm.data.python_docs.ALONE_BYTES", 0)
    assert collect([package], num_workers=2) == alone


def test_splits_are_disjoint_and_follow_the_seed(package: str) -> None:
    options = {"packages": [package], "train_queries": 2, "dev_queries": 1, "test_queries": 2}
    data = DataSettings(dataset="python-docs", options=options)
    picks = []
    for seed in (1, 1, 2, 3, 4):
        loader = open_dataset(data, seed=seed)
        bad = BadRecords()
        queries = {split: [query.query_id for _, query in loader.queries(split, bad)] for split in loader.splits()}
        assert [len(queries[split]) for split in ("train", "dev", "test")] == [2, 1, 2]
        assert len(set().union(*queries.values())) == 5
        texts = {passage.passage_id: passage for _, passage in loader.passages(bad)}
        for split in loader.splits():
            for (_, query), (_, qrel) in zip(loader.queries(split, bad), loader.qrels(split, bad), strict=True):
                assert qrel.query_id == query.query_id
                assert query.text not in texts[qrel.passage_id].text
        picks.append(queries)
    assert picks[0] == picks[1]
    assert any(pick != picks[0] for pick in picks[2:])
    assert find_splits(data) == ["train", "dev", "test"]
    assert guess_sizes(data)[1] == {"train": 2, "dev": 1, "test": 2}
    few = open_dataset(DataSettings(dataset="python-docs", options={"packages": [package], "max_passages": 3}))
    assert len(list(few.passages(BadRecords()))) == 3
    assert few.facts()["passages_per_package"] == {"orchard": 3}


def test_the_signature_is_the_versions(package: str, tmp_path: Path) -> None:
    data = DataSettings(dataset="python-docs", options={"packages": [package, "json", "numpy"]})
    first = signature(data, {})
    assert first["json"] == sys.version.split()[0]
    assert first["numpy"].count(".") >= 1
    assert signature(data, {}) == first
    (tmp_path / "orchard" / "new.py").write_text("x = 1\n")
    assert signature(data, {}) != first
    assert "stdlib" in versions()
    with pytest.raises(DataError, match=r"no package 'nunpy' is installed; did you mean 'numpy'\?"):
        signature(DataSettings(dataset="python-docs", options={"packages": ["nunpy"]}), {})
    with pytest.raises(DataError, match="a list of package names was expected"):
        signature(DataSettings(dataset="python-docs", options={"packages": "numpy"}), {})


def test_the_standard_library() -> None:
    found = collect(["json", "logging"])
    names = {passage.name for passage in found.passages}
    assert {"json.dump", "logging.Logger.debug"} <= names
    assert not any("._" in name or ".tests" in name for name in names)


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("One line only", "One line only", ""),
        ("Wraps over\n    two lines. And more.\n\n    Then a body.", "Wraps over two lines.", "And more.\nThen a body."),
        ("Use e.g. a file, i.e. no pipe. Next.", "Use e.g. a file, i.e. no pipe.", "Next."),
        ("f(x, y) -> int\n\nReturn the sum. Fast.", "Return the sum.", "Fast."),
        ("abs(input, *, out=None) -> Tensor\n\nComputes it.\n\n.. math::\n    x = 1", "Computes it.", "math:\nx = 1"),
        ("Do it.\n\nParameters\n----------\nx : int\n    The :class:`~a.B` or ``x``.", "Do it.", "Parameters\nx : int\nThe a.B or x."),
        ("Add.\n\n>>> add(1,\n...     2)\n3\n", "Add.", "add(1,\n2)\n3"),
        ("Old.\n\n.. versionadded:: 1.0\n\nStill here.", "Old.", "Still here."),
        ("", "", ""),
    ],
)
def test_docstrings_become_plain_text(docstring: str, summary: str, body: str) -> None:
    assert split_docstring(docstring) == (summary, body)
