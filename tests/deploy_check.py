"""What can be deployed is judged by its own tools: `python -m tests.deploy_check`, part of `make check`.

Docker Compose reads every profile, Caddy its file, Helm lints and renders the chart for every set of values,
the Kubernetes API's schemas judge what comes out, and promtool the alerts. What is not installed is
named, and no failure; on Linux for x86-64 the development install has all but promtool (Debian: prometheus).
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "clasp-search"
VALUES = sorted((DEPLOY / "helm" / "values").glob("*.yaml"))
PROFILES = (), ("gpu",), ("monitoring",), ("gpu", "monitoring"), ("scaled",)
KUBERNETES = ("1.27", "1.33", "1.37")
"""The oldest that the chart allows, and later ones."""
WITHOUT_SCHEMA = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of operators, which the API's own schemas do not know."""


def tool(name: str) -> str | None:
    """The path of a program, of this environment before the system's."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def run(*command: object, **environment: str) -> str:
    """What it prints. Ends the check where it fails."""
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def compose(program: str) -> None:
    """On a copy, since `scaled` wants secrets: made by the command that the docs name."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEPLOY, Path(folder) / "deploy", ignore=shutil.ignore_patterns("secrets"))
        shutil.copy(ROOT / "docker-compose.yml", folder)
        run("sh", Path(folder) / "deploy" / "secrets.sh")
        for profiles in PROFILES:
            chosen = [argument for profile in profiles for argument in ("--profile", profile)]
            run(program, "--project-directory", folder, *chosen, "config", "--quiet")


def caddy(program: str) -> None:
    run(program, "validate", "--adapter", "caddyfile", "--config", DEPLOY / "Caddyfile")
    run(
        program,
        "validate",
        "--config",
        DEPLOY / "Caddyfile",
        CLASP_TLS="me@example.org",
        CLASP_HOSTNAME="a.b",
    )


def helm(program: str) -> None:
    from kubernetes_validate import validate

    for values in VALUES:
        run(program, "lint", "--strict", "--quiet", CHART, "--values", values)
        rendered = rendered_chart(program, values)
        for resource in rendered:
            if resource["kind"] not in WITHOUT_SCHEMA:
                for version in KUBERNETES:
                    validate(resource, version, strict=True)


def rendered_chart(program: str, *values: Path) -> list[dict[str, object]]:
    """The objects that an installation with these values makes."""
    chosen = [argument for path in values for argument in ("--values", path)]
    return list(yaml.safe_load_all(run(program, "template", "test", CHART, *chosen)))


def promtool(program: str) -> None:
    """The scrape configuration names files of the container, so its rules are judged by themselves."""
    run(program, "check", "rules", DEPLOY / "alerts.yml")
    run(program, "check", "config", "--syntax-only", DEPLOY / "prometheus.yml")


def main() -> None:
    for name, check in {
        "docker-compose": compose,
        "caddy": caddy,
        "helm": helm,
        "promtool": promtool,
    }.items():
        program = tool(name)
        if program is None:
            print(f"not checked: {name} is not installed")
        else:
            check(program)
            print(f"{name}: well")


if __name__ == "__main__":
    main()
