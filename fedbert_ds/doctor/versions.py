"""Whether Python and the packages are ones that this version works with, by its own metadata."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedbert_ds.doctor.finding import Finding, fault, ok, warning

PACKAGE = "fedbert-ds"
TOLD = ("torch", "transformers", "grpcio", "deepspeed", "triton")
"""Packages whose versions are told even where all is well."""


def version_findings(extra: str = "") -> list[Finding]:
    """Findings about this installation, for a role whose extra has that name."""
    try:
        facts = metadata.metadata(PACKAGE)
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return [warning("versions", "the package is not installed, so none is compared", "pip install . in its folder")]
    return [
        python_finding(platform.python_version(), facts["Requires-Python"] or ""),
        *package_findings(requirements, _installed, extra),
    ]


def python_finding(version: str, wanted: str) -> Finding:
    """Whether this Python lies in the range."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok("Python", version)
    return fault("Python", f"{version} is not in {wanted}", "make an environment with another Python")


def package_findings(
    requirements: Sequence[str], installed: Callable[[str], str | None], extra: str = ""
) -> Iterator[Finding]:
    """A line about all packages, after one for each that is missing or has another version."""
    told, wrong = [], False
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong = True
            role = f"'{PACKAGE}[{extra}]'" if extra else PACKAGE
            has = "is missing" if version is None else f"{version} is not {requirement.specifier}"
            yield fault(requirement.name, has, f"pip install {role}, or '{requirement.name}{requirement.specifier}'")
        elif requirement.name in TOLD:
            told.append(f"{requirement.name} {version}")
    if not wrong:
        yield ok("packages", ", ".join(told) or "all there")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
