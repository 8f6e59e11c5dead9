"""The list of `devices`."""

from __future__ import annotations

from runtime_tests.device_status import DeviceStatus


def render(statuses: list[DeviceStatus]) -> list[str]:
    """The list for a terminal: what is ready, and below each other device the command that makes it so."""
    width = max((len(status.profile.name) for status in statuses), default=0)
    indent = " " * (width + 2)
    lines = []
    for status in statuses:
        profile = status.profile
        lines.append(f"{profile.name:<{width}}  {'ready' if status.ready else 'not ready'}: {profile.description}")
        budget = f", {profile.memory_budget_mb:,} MB" if profile.memory_budget_mb else ""
        lines.append(f"{indent}{', '.join(profile.runtimes)} by {profile.transport}{budget}")
        if status.why_not:
            lines.append(f"{indent}{status.why_not}")
        if status.command:
            lines.append(f"{indent}make it ready: {status.command}")
    return lines
