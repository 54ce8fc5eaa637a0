"""The GPU campaign, at toy size on the CPU: the check of agreement sees what is wrong, and parts do not stop each other."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from benchmarks import pretrain, train_retriever
from benchmarks.gpu import agreement, campaign
from benchmarks.gpu.agreement import Case, Choices, Encoding, Outcome, Step, Tolerance

if TYPE_CHECKING:
    from collections.abc import Iterator

torch.set_num_threads(1)

SIZE = replace(agreement.TOY, passages=8, queries=2, passage_tokens=16, vocabulary=64, micro_batch_tokens=48)
STRICT = agreement.TOLERANCES["fp32"]
NAMES = ["pre-training", "retriever", "distillation", "re-ranker", "encoding"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {case.name: case for case in agreement.make_cases(SIZE, tmp_path_factory.mktemp("agreement"))}


@pytest.fixture
def few_cases(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` checks two of the cases."""
    monkeypatch.setattr(agreement, "make_cases", lambda size, folder: [cases["re-ranker"], cases["encoding"]])
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


# --- agreement


@pytest.mark.parametrize("name", NAMES)
def test_every_case_agrees_on_the_cpu(cases: dict[str, Case], name: str) -> None:
    found = agreement.check(cases[name], "cpu", agreement.TOLERANCES)
    assert [(one.computation, one.agrees, one.error) for one in found] == [("fp32", True, ""), ("bf16", True, "")]
    # bf16 is computed in bf16 and is not the reference once more.
    assert found[1].part_difference > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_do_not_agree(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    reference = case.reference.measure("cpu", "fp32", reference=True)
    module = case.checked.task if isinstance(case.checked, Step) else case.checked.model
    weight = next(parameter for key, parameter in module.named_parameters() if key.endswith("layer.1.output.dense.weight"))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.03)
    try:
        found = case.checked.measure("cpu", "fp32")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not agreement.compare(name, "fp32", reference, found, STRICT).agrees


def test_the_checked_step_computes_some_pieces_twice(cases: dict[str, Case]) -> None:
    calls: list[int] = []
    for step in (cases["retriever"].reference, cases["retriever"].checked):
        assert isinstance(step, Step)
        pieces = len(step.micro_batches[0]["pieces"])
        before = len(calls)
        hook = step.task.get_submodule("model").register_forward_pre_hook(lambda *_: calls.append(1))
        step.measure("cpu", "fp32")
        hook.remove()
        twice = len(calls) - before - pieces
        assert twice == 0 if step is cases["retriever"].reference else 0 < twice < pieces


def test_gradients_are_grouped_by_layer() -> None:
    assert agreement.group_of("masked_lm.bert.encoder.layer.3.attention.self.key.bias") == "masked_lm.bert.encoder.layer.3"
    assert agreement.group_of("masked_lm.bert.embeddings.word_embeddings.weight") == "masked_lm.bert.embeddings"


def test_choices_of_the_reference_are_taken_and_others_counted() -> None:
    choices = Choices()
    choices.begin(reference=True)
    assert choices.settle(torch.tensor([3, 4])).tolist() == [3, 4]
    assert choices.settle(torch.tensor([5, 6])).tolist() == [5, 6]
    choices.begin(reference=False)
    assert choices.settle(torch.tensor([3, 9])).tolist() == [3, 4]
    assert choices.settle(torch.tensor([5, 6])).tolist() == [5, 6]
    assert choices.other_share == 0.25


TOLERANCE = Tolerance(loss=0.1, parts=0.1, choices=0.1)


@pytest.mark.parametrize(
    ("loss", "part", "others", "agrees"),
    [
        (10.0, [3.0, 4.0], 0.0, True),
        (11.0, [3.0, 4.0], 0.0, True),
        (11.1, [3.0, 4.0], 0.0, False),
        (10.0, [3.0, 4.5], 0.0, True),  # 0.5 / 5
        (10.0, [3.0, 4.6], 0.0, False),
        (10.0, [3.0, 4.0], 0.2, False),
        (math.nan, [3.0, 4.0], 0.0, False),
        (10.0, [3.0, math.nan], 0.0, False),
    ],
)
def test_what_agrees(loss: float, part: list[float], others: float, agrees: bool) -> None:
    reference = Outcome(10.0, {"layer": torch.tensor([3.0, 4.0])}, 0.0)
    found = agreement.compare("case", "fp32", reference, Outcome(loss, {"layer": torch.tensor(part)}, others), TOLERANCE)
    assert found.agrees is agrees


def test_a_gradient_that_is_not_there_does_not_agree() -> None:
    part = torch.ones(2)
    found = agreement.compare("case", "fp32", Outcome(1.0, {"a": part, "b": part}), Outcome(1.0, {"a": part}), TOLERANCE)
    assert (found.agrees, found.part, found.part_difference) == (False, "b", math.inf)


def test_a_case_that_cannot_be_computed_is_told_and_the_others_go_on(cases: dict[str, Case]) -> None:
    encoding = cases["encoding"].checked
    assert isinstance(encoding, Encoding)
    broken = Case("broken", encoding, replace(encoding, queries=[7]))  # type: ignore[list-item]
    found = agreement.check(broken, "cpu", agreement.TOLERANCES)
    assert [one.agrees for one in found] == [False, False]
    assert "DataError" in found[0].error


@pytest.mark.usefixtures("few_cases")
def test_main_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert agreement.main(["--device", "cpu", "--toy"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["agrees"] and figures["device"] == "CPU"
    assert [one["case"] for one in figures["comparisons"]] == ["re-ranker", "re-ranker", "encoding", "encoding"]


@pytest.mark.usefixtures("few_cases")
def test_a_broken_tolerance_is_the_exit_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(agreement.TOLERANCES, "bf16", Tolerance(loss=1e-7, parts=1e-7, choices=None))
    assert agreement.main(["--device", "cpu", "--toy"]) == 1
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["agrees"]


# --- campaign


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_do_not_stop_each_other(tmp_path: Path) -> None:
    commands = {
        "fails": ["sh", "-c", "echo before; echo wrong >&2; exit 3"],
        "hangs": ["sh", "-c", "sleep 600 & echo $!; wait"],
        "killed": ["sh", "-c", "kill -9 $$"],
        "works": ["sh", "-c", """echo '{"not": "last"}'; echo '{"speedup": 2.5}'; echo '{noise'; echo goodbye >&2"""],
    }
    assert campaign.run(commands, tmp_path / "results", seconds_each=2, environment={"PATH": "/usr/bin:/bin"}) == 1
    found = records(tmp_path / "results")
    assert {name: (one["exit_status"], one["timed_out"], one["result"]) for name, one in found.items()} == {
        "fails": (3, False, None),
        "hangs": (None, True, None),
        "killed": (-9, False, None),
        "works": (0, False, {"speedup": 2.5}),
    }
    assert (tmp_path / "results" / "fails.txt").read_text(encoding="utf-8") == "before\nwrong\n"
    assert found["hangs"]["seconds"] >= 2 > found["works"]["seconds"]
    child = int((tmp_path / "results" / "hangs.txt").read_text(encoding="utf-8"))
    ends = time.monotonic() + 5
    while is_running(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not is_running(child), "what a part has started ends with it"


def test_a_record_says_what_its_figures_rest_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "answer_of", lambda command: "Some GPU, 81559, 580.65.06" if command[0] == "nvidia-smi" else "")
    assert campaign.run({"part": ["sh", "-c", "echo 'a b'"]}, tmp_path, seconds_each=60, environment={"PATH": "/usr/bin:/bin"}) == 0
    record = records(tmp_path)["part"]
    assert record["commit"] == "unknown"
    assert record["command"] == """sh -c 'echo '"'"'a b'"'"''"""
    assert record["date"].endswith("+00:00")
    hardware = record["hardware"]
    assert (hardware["device"], hardware["device_memory_mebibytes"], hardware["driver"]) == ("Some GPU", 81559, "580.65.06")
    assert hardware["cores"] >= 1 and hardware["processor"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_missing_data_are_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIMLM_DATA", str(tmp_path / "nowhere"))
    assert campaign.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--parts", "agreement,encode"]) == 2
    assert "nowhere/squad is not there, which encode read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert campaign.what_is_missing(["agreement"], "cpu", tmp_path / "nowhere") == ""


def test_a_missing_device_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert campaign.main(["--out", str(tmp_path), "--parts", "agreement"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_options_become_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("SIMLM_DATA", str(tmp_path))
    monkeypatch.setattr(campaign, "run", lambda commands, out, **rest: given.update(commands=commands, out=out, **rest) or 0)
    (tmp_path / "squad").mkdir()
    arguments = [
        "--parts",
        "encode,pretrain",
        "--toy",
        "--device",
        "cpu",
        "--minutes-each",
        "0.5",
        "--add",
        "encode=--rounds 9 --passages 3",
    ]
    assert campaign.main(["--out", str(tmp_path / "out"), *arguments]) == 0
    assert list(given["commands"]) == ["pretrain", "encode"], "in the campaign's order"
    encode = given["commands"]["encode"]
    assert encode[:2] == [sys.executable, "benchmarks/encode.py"]
    assert encode[-6:] == ["--device", "cpu", "--rounds", "9", "--passages", "3"]
    assert given["seconds_each"] == 30
    assert given["environment"]["SIMLM_DATA"] == str(tmp_path) and given["environment"]["HF_HUB_OFFLINE"] == "1"


def test_commands_are_told_without_the_machine() -> None:
    command = campaign.PARTS["rerank"].command("cuda", toy=False, folder=Path("/data/squad"))
    assert campaign.shown(command, {"SIMLM_DATA": "/data"}) == "python benchmarks/rerank.py $SIMLM_DATA/squad --pairs 20000 --device cuda"


@pytest.mark.parametrize("arguments", [["--parts", "agreement,ghost"], ["--add", "ghost=--toy"], ["--minutes-each", "0"]])
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        campaign.main(["--out", str(tmp_path), *arguments])


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_benchmarks_know_the_arguments_of_their_parts(monkeypatch: pytest.MonkeyPatch, device: str, toy: bool) -> None:
    for name, benchmark in (("pretrain", pretrain), ("train_retriever", train_retriever)):
        command = campaign.PARTS[name].command(device, toy=toy, folder=Path("data"))
        monkeypatch.setattr(sys, "argv", command[1:])
        options = benchmark.parse_options()
        assert options.device == device
    assert options.bf16 is (device == "cuda")
