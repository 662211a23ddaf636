"""`flashmoe bench io`: what is read, what it is compared with, and what is printed."""

import json
import random
import stat
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from flashmoe.base.errors import OptionError, ReadError, StoreError
from flashmoe.bench.baselines import Fio, FioFailed, PlainThreads, parse_rate
from flashmoe.bench.io import CACHED, UNCACHED, ReadReport, ReadResult, Verdict, bench_io
from flashmoe.io.files import uncached_problem
from flashmoe.io.reader import Reader
from flashmoe.probe.read_speed import MMAP, Destinations, open_titled, read_for, reader_titles
from flashmoe.probe.record_files import cached_share, evict, record_files, shuffled_batches
from flashmoe.store.layout import TensorSpec
from flashmoe.store.reader import Store, open_store
from tests.support.commands import Run, assert_one_line
from tests.support.skips import needs, require
from tests.support.stores import layer_layout, write_store

BRIEF = {"batches": [2], "seconds": 0.01, "rounds": 1}
BRIEF_OPTIONS = ("--batch", "2", "--seconds", "0.01", "--rounds", "1")
FIO_RATE = 3_000_000_000
FIO_JOB = {"error": 0, "read": {"io_bytes": 6_000_000, "runtime": 2}}
# Of a record, whose last component ends at 8192 + 140.
READ_BYTES = 8332


@dataclass
class FakeFio:
    """A program named fio, first on the PATH, which says `output` and notes how it is called."""

    folder: Path

    def says(self, output: str, code: int = 0, complaint: str = "") -> None:
        (self.folder / "output").write_text(output)
        (self.folder / "complaint").write_text(complaint)
        program = self.folder / "fio"
        program.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$*" >> {self.folder}/calls\n'
            f"cat {self.folder}/complaint >&2\ncat {self.folder}/output\nexit {code}\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFio:
    fake = FakeFio(tmp_path / "bin")
    fake.folder.mkdir()
    fake.says("fio: a warning\n" + json.dumps({"jobs": [FIO_JOB]}))
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


@pytest.fixture
def no_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def modes_here(store: Store) -> list[str]:
    """Uncached reading needs a file system that can."""
    problem = uncached_problem(record_files(store).paths[0])
    return [CACHED] if problem else [CACHED, UNCACHED]


class TestRecords:
    def test_every_record_once_in_batches_of_one_file(self, good_store: Store) -> None:
        files = record_files(good_store)
        assert (len(files.paths), files.per_file, files.records) == (2, 4, 8)
        everything = {
            (good_store.file(layer.layout.file), layer.layout.record_offset(expert))
            for layer in good_store.manifest.layers
            for expert in range(4)
        }
        for size in (1, 2, 3, 4, 5, 8):
            batches = list(shuffled_batches(files, size, random.Random(size)))
            flat = [place for batch in batches for place in batch]
            assert (len(flat), set(flat)) == (8, everything)
            assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
            whole = batches[: 2 * (4 // size)]
            assert all(len({path for path, _ in batch}) == 1 for batch in whole)
            assert [batch[0][0] for batch in whole] == [*files.paths] * (len(whole) // 2)

    def test_the_order_is_random(self, good_store: Store) -> None:
        files = record_files(good_store)
        draw = random.Random(0)
        assert len({str(list(shuffled_batches(files, 2, draw))) for _ in range(20)}) > 10

    def test_files_of_equal_records_with_most_bytes(self, dest: Path) -> None:
        wide = [TensorSpec("gate_proj.weight", "U32", (64, 64))]
        layouts = [layer_layout(0), layer_layout(1, wide), layer_layout(2)]
        layers = [
            (lay, {c.name: bytes(lay.n_experts * c.nbytes) for c in lay.record.components})
            for lay in layouts
        ]
        resident = [bytes(2 * 6 * 5), bytes(4 * 7)]
        write_store(dest, layers, resident)
        files = record_files(open_store(dest))
        assert [path.name for path in files.paths] == [
            "layer-000.safetensors",
            "layer-002.safetensors",
        ]

    @needs("Linux")
    def test_what_was_just_read_is_in_the_page_cache(self, store_folder: Path) -> None:
        paths = record_files(open_store(store_folder)).paths
        for path in paths:
            path.read_bytes()
        assert cached_share(paths) == 1.0
        assert evict(paths)
        assert 0.0 <= cached_share(paths) <= 1.0


class TestReading:
    @pytest.mark.parametrize("title", reader_titles(None))
    def test_bytes_are_those_that_the_readers_counted(self, good_store: Store, title: str) -> None:
        files = record_files(good_store)
        readers: list[Reader] = []

        def opener() -> Reader:
            readers.append(open_titled(title, 2, page_cache=True))
            return readers[-1]

        destinations = Destinations(files, 3)
        reading = read_for(0.3, files, 3, opener, destinations, random.Random(0))
        assert len(readers) > 1, "a store this small is read several times"
        assert reading.counters.bytes == sum(reader.counters.bytes for reader in readers)
        # All but the last reader read every record once.
        assert {reader.counters.bytes for reader in readers[:-1]} == {8 * READ_BYTES}
        assert reading.counters.bytes == reading.counters.reads * READ_BYTES
        assert reading.elapsed >= 0.3
        assert reading.bytes_per_second == reading.counters.bytes / reading.elapsed
        assert 0 < reading.counters.mean_queue_depth <= 3
        assert (reading.counters.minor_faults > 0) == (title == MMAP)

    def test_destinations_take_turns(self, good_store: Store) -> None:
        destinations = Destinations(record_files(good_store), 2)
        first = destinations.take(2)
        assert first[0] is not first[1]
        assert {scatter.nbytes for scatter in first} == {READ_BYTES}
        assert destinations.take(1)[0] not in first

    def test_a_damaged_store_is_a_read_error(self, store_folder: Path) -> None:
        files = record_files(open_store(store_folder))
        with files.paths[1].open("r+b") as file:
            file.truncate(files.offset(3))
        opener = lambda: open_titled(reader_titles("pread")[0], 2, page_cache=True)  # noqa: E731
        with pytest.raises(ReadError, match="too early"):
            read_for(0.05, files, 2, opener, Destinations(files, 2), random.Random(0))


class TestFio:
    def test_jobs_share_the_records(self, good_store: Store) -> None:
        files = record_files(good_store)
        line = Fio("fio", "psync", files, page_cache=True).command(3, 0.5)
        names = ":".join(map(str, files.paths))
        for part in (f"--filename={names}", "--bs=16384", "--direct=0", "--iodepth=1"):
            assert part in line
        assert "--runtime=500ms" in line
        assert "--time_based" not in line
        jobs = [part for part in line if part.startswith(("--name", "--offset", "--size"))]
        # A record of each of two files per job: the fourth is left alone.
        assert jobs == [
            part
            for job in range(3)
            for part in (f"--name=job{job}", f"--offset={files.offset(job)}", "--size=32768")
        ]

    def test_one_job_with_a_queue(self, good_store: Store) -> None:
        files = record_files(good_store)
        line = Fio("fio", "libaio", files, page_cache=False).command(8, 1)
        for part in ("--direct=1", "--iodepth=8", "--time_based", "--name=job0"):
            assert part in line
        assert line[-1] == "--size=131072"
        assert "--name=job1" not in line

    def test_a_colon_in_a_path(self, tmp_path: Path, good_store: Store) -> None:
        link = tmp_path / "a:b"
        link.symlink_to(good_store.path)
        line = Fio("fio", "psync", record_files(open_store(link)), True).command(1, 1)
        (names,) = (part for part in line if part.startswith("--filename="))
        assert names.count("\\:") == 2
        assert names.replace("\\:", "").count(":") == 1

    @pytest.mark.parametrize(
        ("jobs", "rate"),
        [
            ([FIO_JOB], FIO_RATE),
            ([FIO_JOB, {"error": 0, "read": {"io_bytes": 2_000_000, "runtime": 4}}], 2e9),
            ([{"error": 0, "read": {"io_bytes": 5_000, "runtime": 0}}], 5e6),
        ],
    )
    def test_its_rate(self, jobs: list[object], rate: float) -> None:
        assert parse_rate(json.dumps({"jobs": jobs}), "fio") == rate

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            ("", "JSON"),
            ("{", "JSON"),
            ("{}", "JSON"),
            ('{"jobs": []}', "JSON"),
            ('{"jobs": [{"error": 0, "read": {"io_bytes": 0, "runtime": 9}}]}', "read nothing"),
            ('{"jobs": [{"error": 5, "read": {"io_bytes": 1, "runtime": 9}}]}', "could not read"),
        ],
    )
    def test_a_report_without_a_rate(self, output: str, words: str) -> None:
        with pytest.raises(FioFailed, match=words):
            parse_rate(output, "fio psync")

    def test_a_program_that_is_not_there(self, good_store: Store, tmp_path: Path) -> None:
        missing = Fio(str(tmp_path / "fio"), "psync", record_files(good_store), True)
        with pytest.raises(FioFailed, match="cannot be run"):
            missing.rate(2, 0.1)


class TestReport:
    def test_beside_fio(self, good_store: Store, fio: FakeFio) -> None:
        report = bench_io(good_store.path, **BRIEF)
        modes = modes_here(good_store)
        assert list(report.rivals) == modes
        titles = {CACHED: reader_titles(None), UNCACHED: reader_titles("pread")}
        titles[UNCACHED] = [title for title in reader_titles(None) if title != MMAP]
        names = [(r.mode, r.reader) for r in report.results]
        assert names == [
            (mode, name) for mode in modes for name in (report.rivals[mode], *titles[mode])
        ]
        for result in report.results:
            if result.share is None:
                assert result.reader.startswith("fio ")
                assert result.bytes_per_second == result.slowest == result.fastest == FIO_RATE
            else:
                assert result.share == result.bytes_per_second / FIO_RATE
                assert result.queue_depth is not None
                assert 0 < result.queue_depth <= 2
        assert [(v.mode, v.reader) for v in report.verdicts] == [
            (mode, name) for mode in modes for name in titles[mode]
        ]
        shares = {(r.mode, r.reader): r.share for r in report.results}
        for verdict in report.verdicts:
            assert verdict.share == verdict.lowest_share == shares[verdict.mode, verdict.reader]
            assert (verdict.batches, verdict.lowest_batch) == ((2,), 2)
            assert verdict.reached == (verdict.share >= 0.95)
        assert all("--rw=randread" in call and "--bs=16384" in call for call in fio.calls)

    def test_a_share_is_the_median_of_rounds(
        self, good_store: Store, fio: FakeFio, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rates = iter([1e9, 4e9, 2e9] * 20)
        monkeypatch.setattr(Fio, "rate", lambda *_: next(rates))
        report = bench_io(good_store.path, reader="mmap", batches=[1, 3], seconds=0.01, rounds=3)
        rivals = [r for r in report.results if r.share is None]
        assert [(r.batch, r.slowest, r.fastest) for r in rivals] == [(1, 1e9, 4e9), (3, 1e9, 4e9)]
        assert [r.bytes_per_second for r in rivals] == [2e9, 2e9]
        (verdict,) = report.verdicts
        assert (verdict.mode, verdict.reader, verdict.batches) == (CACHED, MMAP, (3,))

    def test_without_fio(self, good_store: Store, no_fio: None) -> None:
        report = bench_io(good_store.path, reader="pread", **BRIEF)
        assert report.notes
        for mode in modes_here(good_store):
            name = report.rivals[mode]
            assert name.startswith("plain reading, ")
            assert f"fio is not installed; {mode} reading is compared with {name}" in str(
                report.notes
            )

    def test_fio_that_fails(self, good_store: Store, fio: FakeFio) -> None:
        fio.says("", code=1, complaint="fio: no such engine\nmore")
        report = bench_io(good_store.path, reader="pread", **BRIEF)
        for mode in modes_here(good_store):
            assert report.rivals[mode].startswith("plain reading, ")
            (note,) = (note for note in report.notes if f"; {mode} reading is" in note)
            assert "ended with code 1: fio: no such engine; " in note

    def test_nothing_of_decode(self, good_store: Store, fio: FakeFio) -> None:
        report = bench_io(good_store.path, reader="pread", batches=[1], seconds=0.01, rounds=1)
        assert report.verdicts == ()

    def test_default_batches_that_the_store_has(self, good_store: Store, fio: FakeFio) -> None:
        report = bench_io(good_store.path, reader="mmap", seconds=0.001, rounds=1)
        assert sorted({result.batch for result in report.results}) == [1, 2, 4, 8]

    @pytest.mark.parametrize("batch", [0, -1, 9])
    def test_a_batch_that_the_store_has_not(self, good_store: Store, batch: int) -> None:
        with pytest.raises(OptionError, match=f"1 to 8 records here, not {batch}"):
            bench_io(good_store.path, batches=[2, batch])

    def test_a_checkpoint_is_no_store(self, float_qwen: Path) -> None:
        with pytest.raises(StoreError, match="flashmoe repack"):
            bench_io(float_qwen)

    def test_progress_counts_every_measurement(self, good_store: Store, fio: FakeFio) -> None:
        seen: list[tuple[int, int]] = []
        bench_io(
            good_store.path,
            reader="pread",
            batches=[1, 2],
            seconds=0.001,
            rounds=2,
            progress=lambda done, total: seen.append((done, total)),
        )
        total = 2 * 2 * 2 * len(modes_here(good_store))
        counted = [done for done, _ in seen]
        assert {of for _, of in seen} == {total}
        assert counted == sorted(counted)
        assert set(counted) == set(range(total + 1))


@pytest.mark.parametrize("page_cache", [True, False])
def test_plain_threads(good_store: Store, page_cache: bool) -> None:
    files = record_files(good_store)
    require("uncached reads", page_cache or UNCACHED in modes_here(good_store))
    rival = PlainThreads(4, files, page_cache)
    assert rival.name == "plain reading, 4 threads"
    assert rival.rate(2, 0.05) > 0


class TestCommand:
    def test_json(self, run_cli: Run, good_store: Store, fio: FakeFio) -> None:
        report = run_cli("bench", "io", good_store.path, *BRIEF_OPTIONS, "--json").json()
        assert list(report) == [field.name for field in fields(ReadReport)]
        for name, kind in (("results", ReadResult), ("verdicts", Verdict)):
            assert report[name]
            for entry in report[name]:
                assert list(entry) == [field.name for field in fields(kind)]
        assert (report["files"], report["records"], report["record_bytes"]) == (2, 8, 16384)

    def test_table(self, run_cli: Run, good_store: Store, fio: FakeFio) -> None:
        result = run_cli("bench", "io", good_store.path, *BRIEF_OPTIONS)
        assert (result.code, result.err) == (0, "")
        assert "8 records of 16.4 kB in 2 files, 8 threads" in result.out
        assert "3.00 (3.00 to 3.00)" in result.out
        for title in reader_titles(None):
            assert title in result.out
        assert "decode's pattern (batches of 2), cached, of fio " in result.out

    def test_wrong_use_is_one_line(
        self, run_cli: Run, good_store: Store, float_qwen: Path, tmp_path: Path
    ) -> None:
        store = good_store.path
        assert_one_line(run_cli("bench", "io"), 2, "STORE")
        assert_one_line(run_cli("bench", "io", float_qwen), 1, str(float_qwen), "flashmoe repack")
        assert_one_line(run_cli("bench", "io", tmp_path / "none"), 1, str(tmp_path / "none"))
        assert_one_line(run_cli("bench", "io", store, "--rounds", "0"), 2, "--rounds")
        assert_one_line(run_cli("bench", "io", store, "--seconds", "nan"), 2, "--seconds")
        assert_one_line(run_cli("bench", "io", store, "--threads", "0"), 2, "--threads")
        assert_one_line(run_cli("bench", "io", store, "--batch", "0"), 2, "batch", "not 0")
        assert_one_line(run_cli("bench", "io", store, "--reader", "tape"), 2, "reader", "tape")
