"""Receipt: every byte of the file is counted once."""

import json
from math import prod

from artifact.builders import BIT_WIDTHS, WEIGHTS, build, source

from plyweight.artifact import ArtifactReader, inspect


def test_every_byte_is_counted_once(tmp_path):
    data = build(tmp_path / "a")
    bill = inspect(source(data))
    total = bill.header_bytes
    for line in bill.layers:
        assert line.num_bytes == line.plane_bytes + line.side_bytes + line.padding_bytes
        total += line.num_bytes
        assert line.total_bytes == total
    assert total == len(data)


def test_planes_cost_one_bit_for_each_weight_and_bit_of_its_own_width(tmp_path):
    bill = inspect(source(build(tmp_path / "a")))
    conv, fc = (-(-prod(w.shape) // 8) for w in WEIGHTS.values())
    assert [line.plane_bytes for line in bill.layers] == [8 * conv + 2 * fc, fc, 5 * fc]
    assert bill.num_weights == sum(prod(w.shape) for w in WEIGHTS.values())
    assert bill.layers[-1].bits_per_weight == 8 * bill.layers[-1].total_bytes / bill.num_weights


def test_a_receipt_reads_the_header_only_and_knows_what_is_held(tmp_path):
    data = build(tmp_path / "a")
    header = ArtifactReader(source(data)).header
    memory = source(data[: header.prefix_bytes(3)])
    bill = inspect(memory)
    assert bill.held == (2, 3)
    assert max(r.stop for r in memory.reads) == header.data_start
    assert bill.artifact_id == header.artifact_id
    assert [line.sha256 for line in bill.layers] == [layer.sha256 for layer in header.layers]


def test_a_receipt_is_plain_json(tmp_path):
    bill = inspect(source(build(tmp_path / "a")))
    assert inspect(tmp_path / "a") == bill
    plain = json.loads(json.dumps(bill.to_json()))
    assert plain == bill.to_json()
    assert [line["bit_width"] for line in plain["layers"]] == list(BIT_WIDTHS)
    assert plain["held"] == list(BIT_WIDTHS)
