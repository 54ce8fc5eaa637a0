"""The arithmetic of the plan for large corpora, against values worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from benchmarks.scale import Units, plan, tables, with_settings

ROOT = Path(__file__).parents[2]

ROUND = replace(
    Units(),
    passages=1e6,
    text_bytes=500,
    passage_tokens=100,
    layers=2,
    hidden=10,
    dim=8,
    storage_bytes=2,
    id_bytes=4,
    core_flops=1e6,
    core_gain_int8=2,
    gpu_flops=1e9,
    gpu_share=0.5,
    tokenise_seconds=0.036,
    gpu_cores=10,
    code_bytes=10,
    rescore_bytes=20,
    build_core_seconds=0.001,
    build_clusters=100,
    shard_passages=400_000,
    shard_clusters=350,
    probes=35,
    code_seconds=1e-7,
    query_seconds=0.006,
    shard_reads=50,
    disk_reads=1000,
    queries_per_second=20,
    load=0.5,
    machine_cores=0.1,
    machine_memory=8e6,
    memory_share=0.5,
    replicas=2,
    gpu_price=2,
    core_price=0.5,
    machine_price=1,
    store_price=1e-6,
)


def test_bytes() -> None:
    found = plan(ROUND)
    assert found.text_bytes == 500e6
    assert found.vectors_bytes == (8 * 2 + 4) * 1e6
    assert found.memory_bytes == 10e6
    assert found.disk_bytes == 20e6
    assert found.flat_memory_bytes == 32e6
    assert found.store_dollars_month == pytest.approx(520)


def test_encoding() -> None:
    found = plan(ROUND)
    # 12 x 2 layers x 10^2 = 2,400 weights, and 2 x 2 x 100 x 10 = 4,000 for attention, twice, for each of 100 tokens.
    assert found.passage_flops == 2 * 100 * (2400 + 4000) == 1_280_000
    # 1.28e12 operations at 5e8 a second, and 36,000 s of tokenising on ten cores.
    assert found.encode_gpu_hours == pytest.approx((2560 + 3600) / 3600)
    assert found.encode_gpu_dollars == pytest.approx(2 * 6160 / 3600)
    assert found.encode_core_hours == pytest.approx(640_000 / 3600)
    assert found.encode_core_dollars == pytest.approx(320_000 / 3600)


def test_index() -> None:
    found = plan(ROUND)
    assert found.shards == 3
    # 250 clusters more than in the measurement: 2 x 250 x 8 operations at 1e6 a second are 4 ms a passage.
    assert found.build_core_hours == pytest.approx(1e6 * 0.005 / 3600)
    assert found.build_dollars == pytest.approx(0.5 * 5000 / 3600)


def test_search() -> None:
    found = plan(ROUND)
    # A tenth of 400,000 codes at 100 ns, and 6 ms.
    assert found.query_latency_seconds == pytest.approx(0.010)
    assert found.query_core_seconds == pytest.approx(0.030)
    assert found.search_cores == pytest.approx(20 * 0.030 / 0.5)
    assert found.machines_for_cores == 12
    assert found.machines_for_memory == 3 * 2
    assert found.machines_for_reads == 3  # 20 x 3 x 50 reads at 1,000 a second
    assert found.machines == 12
    assert found.search_dollars_month == 12 * 730


def test_what_bounds_the_machines() -> None:
    assert plan(replace(ROUND, machine_cores=100)).machines == 6
    assert plan(replace(ROUND, machine_cores=100, disk_reads=100)).machines == 30


def test_every_unit_says_what_it_rests_on_and_counts() -> None:
    before = plan(Units())
    for item in fields(Units):
        assert item.metadata["rests_on"]
        changed = [plan(replace(Units(), **{item.name: getattr(Units(), item.name) * factor})) for factor in (64, 1 / 64)]
        assert any(found != before for found in changed), f"{item.name} changes nothing"


def test_settings() -> None:
    assert with_settings(Units(), ["passages=2e9", "gpu_price=1.5"]) == replace(Units(), passages=2e9, gpu_price=1.5)
    for wrong, message in (("pasages=1", "no such unit"), ("passages=many", "above 0"), ("passages=0", "above 0"), ("passages", "above 0")):
        with pytest.raises(SystemExit, match=message):
            with_settings(Units(), [wrong])


def test_the_page_shows_what_is_computed() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    units = Units()
    for line in tables(units, plan(units)).splitlines():
        assert line in page, line


def test_the_last_line_is_json() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale.py"), "--set", "passages=8841823"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert json.loads(lines[-1])["shards"] == 1
