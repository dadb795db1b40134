"""Go templates of `--format`: one case per line."""

from __future__ import annotations

import pytest

from labkernel.commands.template import render
from labkernel.errors import UsageError

DATA = {
    "Names": "web",
    "ID": "0123456789ab",
    "State": {"Status": "running", "ExitCode": 0, "Health": None},
    "Env": ["A=1", "B=2"],
    "Labels": {"course": "labs", "a": "b"},
    "Networks": {"none": {"IPAddress": ""}},
    "Empty": [],
    "Ok": True,
    "Label": lambda name: {"course": "labs"}.get(name, ""),
}

CASES = [
    ("{{.Names}}", "web"),
    ("{{ .Names }}: {{.State.Status}}", "web: running"),
    ("no action", "no action"),
    ("{{json .State}}", '{"Status":"running","ExitCode":0,"Health":null}'),
    ("{{json .Names}}", '"web"'),
    ("{{.State.ExitCode}} {{.Ok}}", "0 true"),
    ("{{.Env}}", "[A=1 B=2]"),
    ("{{.Labels}}", "map[a:b course:labs]"),
    ("{{.State.Health}}", "<nil>"),
    ("{{if .State.Health}}x{{else}}none{{end}}", "none"),
    ("{{(index .Env 0)}} {{slice (index .Env 1) 0 1}}", "A=1 B"),
    ("{{range .Env}}{{.}};{{end}}", "A=1;B=2;"),
    ("{{range $i, $e := .Env}}{{$i}}={{$e}} {{end}}", "0=A=1 1=B=2 "),
    ("{{range $k, $v := .Labels}}{{$k}}:{{$v}},{{end}}", "a:b,course:labs,"),
    ("{{range .Empty}}x{{else}}none{{end}}", "none"),
    ("{{if .Ok}}yes{{else}}no{{end}}", "yes"),
    ('{{if eq .Names "db"}}a{{else if eq .Names "web"}}b{{else}}c{{end}}', "b"),
    ("{{with .State}}{{.Status}}{{end}}", "running"),
    ("{{with .State}}{{$.Names}}{{end}}", "web"),
    ('{{index .Labels "course"}}', "labs"),
    ("{{index .Env 1}}", "B=2"),
    ("{{len .Env}}", "2"),
    ("{{.Names | upper}}", "WEB"),
    ("{{.Env | json}}", '["A=1","B=2"]'),
    ('{{join .Env "+"}}', "A=1+B=2"),
    ('{{.Label "course"}}', "labs"),
    ('{{printf "%s-%d" .Names 3}}', "web-3"),
    ("{{println .Names}}", "web\n"),
    ("{{(index .Env 0) | lower}}", "a=1"),
    ("a {{- .Names -}} b", "a{{- .Names -}}b".replace("{{- .Names -}}", "web")),
    ("{{/* nothing */}}x", "x"),
    ("{{$n := .Names}}{{$n}}{{$n}}", "webweb"),
    ("{{not .Ok}} {{and .Ok .Names}} {{or .Empty .Names}}", "false web web"),
]


@pytest.mark.parametrize(("template", "expected"), CASES)
def test_renders(template: str, expected: str) -> None:
    assert render(template, DATA) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{.Name}}", "no entry"),
        ("{{.names}}", "no entry"),
        ("{{nofunc .Names}}", 'function "nofunc" not defined'),
        ("{{range .Env}}", "{{end}} is missing"),
        ("{{end}}", "unexpected"),
        ("{{.Names", "unclosed action"),
        ("{{}}", "missing value"),
        ("{{.Names.More}}", "can't evaluate"),
        ("{{index .Env 9}}", "error calling index"),
        ("{{$x}}", "undefined variable"),
    ],
)
def test_refuses(template: str, words: str) -> None:
    with pytest.raises(UsageError, match="template") as caught:
        render(template, DATA)
    assert words in caught.value.brief


def test_suggests_the_field_that_was_meant() -> None:
    with pytest.raises(UsageError) as caught:
        render("{{.names}}", DATA)
    assert caught.value.resolution == "did you mean `.Names`?"


def test_a_field_after_a_parenthesis() -> None:
    assert render('{{(index .Networks "none").IPAddress}}|{{(index .Env 0) | lower}}', DATA) == "|a=1"
    ports = {"Ports": {"80/tcp": [{"HostPort": "8080"}]}}
    assert render('{{(index (index .Ports "80/tcp") 0).HostPort}}', ports) == "8080"


def test_fields_docker_leaves_out_of_its_documents() -> None:
    data = {"Mounts": [{"Type": "bind"}], "Config": {"Cmd": None, "Volumes": None}, "State": {}}
    template = (
        "{{range .Mounts}}[{{.Name}}]{{end}}{{.Config.Cmd}}{{.Config.Volumes}}{{.State.Health}}{{json .Config.Cmd}}"
    )
    assert render(template, data, document=True) == "[][]map[]<nil>null"
    assert render("{{len .Config.Cmd}}{{range .Config.Cmd}}x{{else}}none{{end}}", data, document=True) == "0none"
    with pytest.raises(UsageError, match="no entry"):
        render("{{.Nosuch}}", data, document=True)
