"""`vgen doctor`: whether this machine can make videos, and with what."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from vgen import doctor as checkup
from vgen.cli import flags
from vgen.cli.results import Format

app = typer.Typer(add_completion=False)

EPILOG = """
[bold]Examples[/bold]

vgen doctor

vgen doctor --format json | jq '.findings[] | select(.level == "problem")'

[dim]Exit codes: 0 vgen generate would work, 1 something is in its way.[/dim]
"""


@app.command(epilog=EPILOG)
def doctor(form: flags.Form = Format.text) -> None:
    """Tell what this machine has for making videos, and how to mend what is in the way."""
    findings = checkup.examine()
    works = checkup.works(findings)
    if form is Format.json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.level:<7}  {finding.name:<{width}}  {finding.says}")
            if finding.fix is not None:
                print(f"{'':<7}  {'':<{width}}  fix: {finding.fix}")
        num_problems = sum(finding.level == "problem" for finding in findings)
        noun = "problem is" if num_problems == 1 else "problems are"
        print("\nvgen generate works here." if works else f"\n{num_problems} {noun} in the way of vgen generate.")
    if not works:
        raise typer.Exit(1)
