"""Opening: what a path stands for."""

import pytest
from artifact.builders import build

from plyweight.artifact import FileSource, SplitSource, open_source, split, split_folder
from plyweight.errors import SourceError


def test_a_folder_with_a_sidecar_and_the_sidecar_itself_are_a_split_artifact(tmp_path):
    data = build(tmp_path / "whole")
    split(tmp_path / "whole", tmp_path / "parts")
    for path in (tmp_path / "parts", tmp_path / "parts" / "layers.json"):
        assert split_folder(path) == tmp_path / "parts"
        source = open_source(path)
        assert isinstance(source, SplitSource)
        assert source.size() == len(data)
    assert isinstance(open_source(str(tmp_path / "whole")), FileSource)
    assert split_folder(tmp_path / "whole") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is a directory"),
        ("none", "does not exist"),
        ("none/layers.json", "does not exist"),
        ("x" * 5000, "cannot be opened"),
        ("x\0y", "cannot be opened"),
    ],
)
def test_a_path_that_stands_for_nothing_is_a_source_error(tmp_path, name, message):
    with pytest.raises(SourceError, match=message):
        open_source(f"{tmp_path}/{name}")
