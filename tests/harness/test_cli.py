from typer.testing import CliRunner

from hem_ext.harness.cli import app


def test_an_output_that_is_a_file(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    result = CliRunner().invoke(app, ["paper", "--output", str(file)])
    assert result.exit_code == 2
    assert "is a file" in " ".join(result.output.replace("│", "").split())


def test_no_command_shows_help():
    result = CliRunner().invoke(app, [])
    assert "compare" in result.output
