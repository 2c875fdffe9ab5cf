"""Calls of the command line in this process, and what their answers look like."""

import json

from plyweight.cli import main


def run(capsys, *arguments):
    """Exit code, stdout and stderr."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    """What ``--json`` prints: one object on one line, and nothing else there."""
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def assert_one_sentence(result, *words):
    """It failed, and says so in one line."""
    code, out, err = result
    assert (code, out) == (1, "")
    assert err.startswith("plyweight: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def assert_called_wrongly(result, *words):
    """The usage, and why."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("Usage: plyweight")
    assert "Traceback" not in err
    assert all(word in err for word in words), err
