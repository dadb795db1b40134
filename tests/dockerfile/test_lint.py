"""Build checks: each rule found where it should be, and nowhere else."""

from __future__ import annotations

import pytest

from labkernel.dockerfile.graph import verify
from labkernel.dockerfile.ignorefile import IgnoreMatcher
from labkernel.dockerfile.lint import RULES, Surroundings, lint, lint_error, options, parse_options
from labkernel.errors import DockerfileError

CLEAN = 'ARG V=1\nFROM alpine:$V AS base\nWORKDIR /x\nCOPY a b\nENV A=$V\nEXPOSE 80/tcp\nCMD ["a"]\n'


def found(text: str, **around: object) -> list[tuple[str, int]]:
    program = verify(text)
    return [(item.rule, item.line) for item in lint(program, None, Surroundings(**around))]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rule", "line"),
    [
        ("FROM a AS Base\n", "StageNameCasing", 1),
        ("FROM a as base\n", "FromAsCasing", 1),
        ("FROM a\nRUN a \\\n\n b\n", "NoEmptyContinuation", 2),
        ("FROM a\nRUN a\nrun b\n", "ConsistentInstructionCasing", 3),
        ("FROM a\nRUN a\nRun b\n", "ConsistentInstructionCasing", 3),
        ("FROM a AS b\nFROM a AS b\n", "DuplicateStageName", 2),
        ("FROM a AS scratch\n", "ReservedStageName", 1),
        ("FROM a\nCMD a\n", "JSONArgsRecommended", 2),
        ("FROM a\nMAINTAINER a\n", "MaintainerDeprecated", 2),
        ("FROM a:$V\n", "UndefinedArgInFrom", 1),
        ("FROM a\nWORKDIR x\n", "WorkdirRelativePath", 2),
        ("FROM a\nCOPY $x /\n", "UndefinedVar", 2),
        ('FROM a\nCMD ["a"]\nCMD ["b"]\n', "MultipleInstructionsDisallowed", 2),
        ("FROM a\nLABEL a b\n", "LegacyKeyValueFormat", 2),
        ("FROM --platform=$TARGETPLATFORM a\n", "RedundantTargetPlatform", 1),
        ("FROM a\nARG GITHUB_TOKEN\n", "SecretsUsedInArgOrEnv", 2),
        ("ARG V\nFROM $V\n", "InvalidDefaultArgInFrom", 2),
        ("FROM --platform=linux/amd64 a\n", "FromPlatformFlagConstDisallowed", 1),
        ("FROM a\nEXPOSE 80/TCP\n", "ExposeProtoCasing", 2),
        ("FROM a\nEXPOSE 127.0.0.1:80:80\n", "ExposeInvalidFormat", 2),
        ("# check=experimental=all\nFROM a\n# wrong\nARG x\n", "InvalidDefinitionDescription", 4),
    ],
)
def test_rule(text: str, rule: str, line: int) -> None:
    assert (rule, line) in found(text)
    assert {name for name, _ in found(text)} <= {rule, "UndefinedVar", "InvalidDefaultArgInFrom"}


def test_clean() -> None:
    assert found(CLEAN.replace("$V\nEXPOSE", "1\nEXPOSE")) == []
    assert found('FROM --platform=linux/arm64 a AS build-arm64\nSHELL ["a"]\nCMD x\nARG public_key\n') == []


def test_here_documents_are_looked_at_where_variables_are_replaced_in_them() -> None:
    text = "FROM a\nRUN <<E\n$A\nE\nCOPY <<'E' /x\n$B\nE\nCOPY <<E <<E2 /y/\n'$PATH' \"\nE\nc \"$C\"\nE2\n"
    assert found(text) == [("UndefinedVar", 8)]


def test_a_message_has_the_word_as_it_is_written() -> None:
    findings = lint(verify("FROM a\nenv A b\nRUN x\ncmd y\n"))
    assert {item.message.split()[0] for item in findings if item.rule == "LegacyKeyValueFormat"} == {'"env'}
    assert [item.message.split()[4] for item in findings if item.rule == "JSONArgsRecommended"] == ["cmd"]


def test_ignored_sources() -> None:
    text = "FROM a\nCOPY ./tmp/x /\nCOPY --from=b tmp/x /\nADD https://x/tmp /\n"
    assert found(text, ignore=IgnoreMatcher(["tmp"])) == [("CopyIgnoredFile", 2)]
    assert found(text, ignore=IgnoreMatcher(["tmp", "!tmp/x"])) == []


def test_undefined_variables_follow_scopes() -> None:
    text = "ARG G=1\nFROM a AS one\nARG G\nENV A=$G B=$PATH\nFROM one\nCOPY $A $G /\nFROM a\nCOPY $G /\n"
    assert [item for item in found(text) if item[0] == "UndefinedVar"] == [("UndefinedVar", 8)]


def test_suggestion() -> None:
    warning = lint(verify("FROM a\nENV NAME=x\nCOPY $NMAE /\n"))[0]
    assert warning.message == "Usage of undefined variable '$NMAE' (did you mean $NAME?)"


def test_options() -> None:
    text = "# check=skip=JSONArgsRecommended;error=true\nFROM a as b\nCMD x\n"
    program = verify(text)
    settings = options(program.dockerfile)
    warnings = lint(program, settings)
    assert [item.rule for item in warnings] == ["FromAsCasing"]
    failed = lint_error(warnings, settings)
    assert failed is not None
    assert "FromAsCasing" in failed.brief
    assert lint(program, parse_options("skip=all")) == []
    for bad in ("x=y", "skip", "error=maybe"):
        with pytest.raises(DockerfileError):
            parse_options(bad)


def test_rules_are_documented() -> None:
    assert len(RULES) == 22
    assert RULES["JSONArgsRecommended"].url.endswith("/json-args-recommended/")
    assert RULES["SecretsUsedInArgOrEnv"].url.endswith("/secrets-used-in-arg-or-env/")


def test_a_comment_above_an_instruction_takes_a_rule_back() -> None:
    text = (
        "FROM a\n# check=skip=JSONArgsRecommended because it is short\nCMD a\n"
        "# check=skip=all\nMAINTAINER me\n\n# check=nonsense\nWORKDIR x\n"
        "# check=skip=UndefinedVar\n\nCOPY $x /\n"
    )
    assert found(text) == [
        ("WorkdirRelativePath", 8),
        ("UndefinedVar", 11),
    ]  # a blank line parts comment and instruction
    described = "FROM a\n# not its name\n# check=experimental=InvalidDefinitionDescription\nARG X\n"
    assert found(described) == [("InvalidDefinitionDescription", 4)]


def test_a_stage_knows_the_args_of_its_base() -> None:
    assert found("FROM a AS b\nARG X=1\nFROM b\nCOPY $X /\nFROM a\nCOPY $X /\n") == [("UndefinedVar", 6)]
