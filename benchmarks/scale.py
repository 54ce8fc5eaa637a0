"""What a large corpus costs: bytes, machines, hours and money of encoding, index and search, from unit figures.

python benchmarks/scale.py [--set NAME=VALUE ...]

Unit figures that were measured are those of docs/performance.md; prices, and what no GPU was there to measure, are assumptions. Each one
has a name, is printed with what it rests on, and can be set. Nothing is run: this is arithmetic, and docs/scale.md is what it prints for
1 billion passages. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

HOUR = 3600.0
MONTH_HOURS = 730.0


def unit(value: float, rests_on: str) -> Any:
    """A unit figure, and what it rests on."""
    return field(default=value, metadata={"rests_on": rests_on})


@dataclass(frozen=True)
class Units:
    """Unit figures. Bytes are decimal; a core is one hardware core at full work."""

    passages: float = unit(1e9, "the plan")
    text_bytes: float = unit(600.0, "assumed: text and title of a passage")
    passage_tokens: float = unit(131.0, "measured: SQuAD, cut at 144, special tokens included")
    layers: float = unit(12.0, "BERT-base")
    hidden: float = unit(768.0, "BERT-base")
    dim: float = unit(768.0, "BERT-base")
    storage_bytes: float = unit(2.0, "encode.storage = fp16")
    id_bytes: float = unit(16.0, "assumed: an id and its place in Parquet")
    core_flops: float = unit(67e9, "measured: 24.0 passages of 131 tokens a second on one Zen 3 core, 6 x 384, fp32")
    core_gain_int8: float = unit(1.35, "measured: 32.3 against 24.0 passages a second, no VNNI")
    gpu_flops: float = unit(989e12, "an H100's bf16 rate, its maker's figure")
    gpu_share: float = unit(0.35, "assumed, not measured: share of that rate which encoding reaches")
    tokenise_seconds: float = unit(0.42e-3, "measured: tokenising is 1% of encoding 24.0 passages a second on one core")
    gpu_cores: float = unit(8.0, "the plan: cores beside each GPU; a worker tokenises, then computes, so both times add up")
    code_bytes: float = unit(117.0, "measured: rabitq, 103 MB in memory for 880,000 x 768")
    rescore_bytes: float = unit(772.0, "int8 vectors and their scale, on disk")
    build_core_seconds: float = unit(303e-6, "measured: 267 s for 880,000 passages, one thread, 1,295 clusters")
    build_clusters: float = unit(1295.0, "of that measurement")
    shard_passages: float = unit(10e6, "the plan: near the largest index that was built here (8.8M)")
    shard_clusters: float = unit(4096.0, "the index of 8.8M")
    probes: float = unit(128.0, "the index of 8.8M")
    code_seconds: float = unit(50e-9, "measured: one code of 768 bits")
    query_seconds: float = unit(3.5e-3, "measured: centroids and 400 rows scored again, of a query in a shard")
    shard_reads: float = unit(40.0, "the plan: candidates of a query in a shard that are scored again, 4 x 10")
    disk_reads: float = unit(500e3, "assumed: random reads a second of one NVMe disk")
    queries_per_second: float = unit(100.0, "the plan, at peak")
    load: float = unit(0.5, "the plan: share of the cores that is busy at peak")
    machine_cores: float = unit(32.0, "the plan: a search machine")
    machine_memory: float = unit(128e9, "the plan: bytes of memory of a search machine")
    memory_share: float = unit(0.5, "the plan: share of it for codes; the rest is page cache and system")
    replicas: float = unit(2.0, "the plan: copies of the index")
    gpu_price: float = unit(3.0, "assumed: dollars an hour of one GPU with its host")
    core_price: float = unit(0.04, "assumed: dollars an hour of one core")
    machine_price: float = unit(1.6, "assumed: dollars an hour of a search machine with a local disk")
    store_price: float = unit(0.023e-9, "assumed: dollars a byte and month in an object store")


@dataclass(frozen=True)
class Plan:
    """What the units come to. Hours are of one GPU or core; money is in dollars."""

    text_bytes: float
    vectors_bytes: float
    passage_flops: float
    encode_gpu_hours: float
    encode_gpu_dollars: float
    encode_core_hours: float
    encode_core_dollars: float
    shards: float
    build_core_hours: float
    build_dollars: float
    memory_bytes: float
    disk_bytes: float
    query_core_seconds: float
    query_latency_seconds: float
    search_cores: float
    machines_for_cores: float
    machines_for_memory: float
    machines_for_reads: float
    machines: float
    search_dollars_month: float
    store_dollars_month: float
    flat_memory_bytes: float


def plan(units: Units) -> Plan:
    """The arithmetic; every line of it stands in docs/scale.md."""
    u = units
    parameters = 12 * u.layers * u.hidden**2
    attention = 2 * u.layers * u.passage_tokens * u.hidden
    passage_flops = 2 * u.passage_tokens * (parameters + attention)
    total_flops = u.passages * passage_flops
    vectors_bytes = u.passages * (u.dim * u.storage_bytes + u.id_bytes)
    text_bytes = u.passages * u.text_bytes
    gpu_hours = (total_flops / (u.gpu_flops * u.gpu_share) + u.passages * u.tokenise_seconds / u.gpu_cores) / HOUR
    core_hours = total_flops / (u.core_flops * u.core_gain_int8) / HOUR
    shards = math.ceil(u.passages / u.shard_passages)
    assign = 2 * (u.shard_clusters - u.build_clusters) * u.dim / u.core_flops
    build_core_hours = u.passages * (u.build_core_seconds + assign) / HOUR
    in_shard = u.shard_passages * u.probes / u.shard_clusters * u.code_seconds + u.query_seconds
    query_core_seconds = shards * in_shard
    search_cores = u.queries_per_second * query_core_seconds / u.load
    for_cores = math.ceil(search_cores / u.machine_cores)
    for_memory = math.ceil(u.passages * u.code_bytes / (u.machine_memory * u.memory_share)) * u.replicas
    for_reads = math.ceil(u.queries_per_second * shards * u.shard_reads / u.disk_reads)
    machines = max(for_cores, for_memory, for_reads)
    return Plan(
        text_bytes=text_bytes,
        vectors_bytes=vectors_bytes,
        passage_flops=passage_flops,
        encode_gpu_hours=gpu_hours,
        encode_gpu_dollars=gpu_hours * u.gpu_price,
        encode_core_hours=core_hours,
        encode_core_dollars=core_hours * u.core_price,
        shards=shards,
        build_core_hours=build_core_hours,
        build_dollars=build_core_hours * u.core_price,
        memory_bytes=u.passages * u.code_bytes,
        disk_bytes=u.passages * u.rescore_bytes,
        query_core_seconds=query_core_seconds,
        query_latency_seconds=in_shard,
        search_cores=search_cores,
        machines_for_cores=for_cores,
        machines_for_memory=for_memory,
        machines_for_reads=for_reads,
        machines=machines,
        search_dollars_month=machines * u.machine_price * MONTH_HOURS,
        store_dollars_month=(text_bytes + vectors_bytes) * u.store_price,
        flat_memory_bytes=u.passages * u.dim * 4,
    )


def with_settings(units: Units, settings: list[str]) -> Units:
    """Units with some set, as NAME=VALUE; SystemExit for a name that is none or a value that is no number above 0."""
    known = {item.name for item in fields(Units)}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known:
            raise SystemExit(f"--set {setting}: no such unit; known: {', '.join(sorted(known))}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            raise SystemExit(f"--set {setting}: a number above 0 was expected")
        units = replace(units, **{name: number})
    return units


def tables(units: Units, found: Plan) -> str:
    """Units and plan as Markdown."""
    lines = ["| unit | value | rests on |", "|---|--:|---|"]
    lines += [f"| {item.name} | {getattr(units, item.name):g} | {item.metadata['rests_on']} |" for item in fields(Units)]
    rows = {
        "text": _bytes(found.text_bytes),
        "vectors in files": _bytes(found.vectors_bytes),
        "operations a passage": f"{found.passage_flops / 1e9:.1f} GFLOP",
        "encoding on GPUs": f"{found.encode_gpu_hours:,.0f} GPU hours, ${found.encode_gpu_dollars:,.0f}",
        "encoding on cores, int8": f"{found.encode_core_hours:,.0f} core hours, ${found.encode_core_dollars:,.0f}",
        "shards": f"{found.shards:,.0f}",
        "building": f"{found.build_core_hours:,.0f} core hours, ${found.build_dollars:,.0f}",
        "codes in memory": f"{_bytes(found.memory_bytes)} (flat fp32: {_bytes(found.flat_memory_bytes)})",
        "int8 vectors on disks": _bytes(found.disk_bytes),
        "one query in one shard": f"{found.query_latency_seconds * 1000:.1f} ms of a core",
        "one query": f"{found.query_core_seconds:.2f} core seconds",
        f"{units.queries_per_second:g} queries a second": f"{found.search_cores:,.0f} cores",
        "machines": (
            f"{found.machines:,.0f} (for cores {found.machines_for_cores:,.0f}, for memory {found.machines_for_memory:,.0f}, "
            f"for reads {found.machines_for_reads:,.0f})"
        ),
        "search, a month": f"${found.search_dollars_month:,.0f}",
        "text and vectors in an object store, a month": f"${found.store_dollars_month:,.0f}",
    }
    lines += ["", "| | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for size, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:.0f} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help="Change a unit figure.")
    units = with_settings(Units(), parser.parse_args().settings)
    found = plan(units)
    print(tables(units, found))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
