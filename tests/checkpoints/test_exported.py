import inspect
import io
import logging
import zipfile

import pytest
import torch
from torch import nn

from stability_probe import StabilityProbeError
from stability_probe.checkpoints import exported, load_checkpoint
from stability_probe.checkpoints.exported import read_export
from tests.checkpoints.mutations import assert_one_line, explains
from tests.checkpoints.saved_files import Canary, conv_unet, pack_again, save_export

trusted = pytest.mark.filterwarnings("ignore:.*trusted")


@pytest.fixture
def path(tmp_path):
    return save_export(tmp_path)


def test_rejects_an_archive_that_is_not_trusted(path, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("was read"))
    with pytest.raises(
        StabilityProbeError,
        match=r"net.pt2: reading a torch.export archive can run code .* pass --trust-pickle",
    ) as error:
        load_checkpoint(path)
    assert_one_line(str(error.value))


def test_a_trusted_one_warns_and_computes_the_same(path):
    x = torch.randn(1, 1, 8, 8)
    with pytest.warns(UserWarning, match="net.pt2: trusted, and reading it runs code from the fi"):
        loaded = load_checkpoint(path, trust_pickle=True)
    assert torch.equal(loaded.model(x), conv_unet()(x))
    assert not loaded.model.training
    assert loaded.format == "torch.export"
    assert loaded.description == (
        "UnflattenedModule, exported program, its class names lost (torch.export)"
    )


@trusted
def test_the_hierarchy_is_kept(path):
    model = read_export(path, trust=True)
    assert {"inp", "down", "up", "out"} <= dict(model.named_children()).keys()
    assert model.state_dict().keys() == conv_unet().state_dict().keys()


@trusted
def test_its_weights_fit_a_factory(path):
    loaded = load_checkpoint(
        path, factory="tests.checkpoints.saved_files:ConvUNet", trust_pickle=True
    )
    assert torch.equal(loaded.model.inp.weight, conv_unet().inp.weight)
    assert type(loaded.model).__name__ == "ConvUNet"


def with_example_inputs(path, inputs):
    data = io.BytesIO()
    torch.save(inputs, data)
    return pack_again(path, {"data/sample_inputs/model.pt": data.getvalue()})


def test_code_in_it_runs_only_if_trusted(path, tmp_path):
    canary = tmp_path / "canary"
    with_example_inputs(path, Canary(canary))
    with pytest.raises(StabilityProbeError, match="can run code"):
        load_checkpoint(path)
    assert not canary.exists()
    with pytest.warns(UserWarning, match="trusted"):
        explains(lambda: load_checkpoint(path, trust_pickle=True))
    assert canary.exists()


def contents(path):
    """Where the bytes of each member lie in an archive: name -> (start, end)."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        found = {}
        for info in archive.infolist():
            at = info.header_offset
            start = (
                at + 30 + sum(int.from_bytes(data[at + i : at + i + 2], "little") for i in (26, 28))
            )
            found[info.filename.partition("/")[2]] = start, start + info.file_size
    return found


@trusted
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", ["data/weights/weight_0", "models/model.json", "archive_version", "byteorder",
             "data/weights/model_weights_config.json", "data/sample_inputs/model.pt"]
)  # fmt: skip
def test_rejects_a_member_with_another_checksum(path, name, place, monkeypatch):
    start, end = contents(path)[name]
    data = bytearray(path.read_bytes())
    data[start + int(place * (end - start))] ^= 4
    path.write_bytes(data)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("was read"))
    with pytest.raises(StabilityProbeError, match=r"as a zip archive .BadZipFile: Bad CRC-32 for"):
        load_checkpoint(path, trust_pickle=True)


@trusted
def test_rejects_a_compressed_one(path):
    pack_again(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(StabilityProbeError, match="are compressed, and torch stores them as they"):
        load_checkpoint(path, trust_pickle=True)


@trusted
def test_one_that_was_packed_again_is_read(path):
    assert explains(lambda: load_checkpoint(pack_again(path, {}), trust_pickle=True)) is None


@trusted
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("models/model.json", b""),
        ("models/model.json", b"{}"),
        ("models/model.json", b"[" * 100_000),
        ("models/model.json", b"\xff\xfe"),
        ("data/weights/model_weights_config.json", b"{}"),
        ("data/weights/model_weights_config.json", b'{"config": {"inp.weight": 3}}'),
        ("data/weights/weight_0", b"abc"),
        ("data/constants/model_constants_config.json", b"null"),
        ("archive_version", b"999999"),
        ("archive_version", b"x"),
        ("archive_format", b"xyz"),
    ],
)
def test_rejects_crafted_members_with_the_right_checksum(path, name, data):
    message = explains(lambda: load_checkpoint(pack_again(path, {name: data}), trust_pickle=True))
    assert message and "cannot be read as a torch.export archive (" in message


@trusted
@pytest.mark.parametrize("size", [10**6, 10**12, -1])
def test_rejects_weights_of_more_numbers_than_the_file_has(path, size):
    start, end = contents(path)["data/weights/model_weights_config.json"]
    config = path.read_bytes()[start:end]
    assert b'"as_int": 4' in config or b'"as_int":4' in config
    changed = config.replace(b'"as_int": 4', b'"as_int": %d' % size)
    changed = changed.replace(b'"as_int":4', b'"as_int":%d' % size)
    pack_again(path, {"data/weights/model_weights_config.json": changed})
    assert explains(lambda: load_checkpoint(path, trust_pickle=True))


@trusted
def test_the_logger_is_left_as_it_was(path, monkeypatch):
    logger = logging.getLogger("torch.export")
    monkeypatch.setattr(logger, "level", logging.INFO)
    read_export(path, trust=True)
    pack_again(path, {"models/model.json": b"{}"})
    with pytest.raises(StabilityProbeError, match=r"cannot be read as a torch.export archive"):
        read_export(path, trust=True)
    assert logger.level == logging.INFO


@trusted
def test_a_network_without_weights(tmp_path):
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = load_checkpoint(tmp_path / "net.pt2", trust_pickle=True)
    assert loaded.model(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]


@trusted
def test_classes_of_outputs_are_imported_before_the_archive_is_read(path, monkeypatch):
    """torch.export cannot read a structured output whose class it has not seen."""
    name = "tests.checkpoints.saved_files"
    classes = (f"{name}.Output", "no.such.C")
    spec = " ".join(rf"\"type\": \"{c}\"" for c in classes)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/more.json", spec)
    seen = []
    monkeypatch.setattr(exported.importlib, "import_module", lambda name: seen.append(name))
    exported._import_outputs(path)
    assert {"no.such", name} <= set(seen)
    monkeypatch.undo()
    exported._import_outputs(path)  # no.such is not there, which is not its affair


@trusted
def test_what_it_was_exported_for_is_known(tmp_path):
    class Two(nn.Module):
        def forward(self, sample, timestep):
            return sample * timestep[:, None]

    given = (torch.ones(3, 5), torch.tensor([1, 2, 3]))
    batch = torch.export.Dim("batch")
    for dims, size in ((None, 3), (({0: batch}, {0: batch}), None)):
        program = torch.export.export(Two(), given, dynamic_shapes=dims)
        torch.export.save(program, tmp_path / "two.pt2")
        model = read_export(tmp_path / "two.pt2", trust=True)
        assert (model.input_shape, model.batch_size) == ((5,), size)
        parameters = inspect.signature(model.forward).parameters
        assert list(parameters) == ["sample", "timestep"]
        assert parameters["timestep"].annotation is torch.LongTensor
        assert torch.equal(model(given[0], timestep=given[1]), Two()(*given))
