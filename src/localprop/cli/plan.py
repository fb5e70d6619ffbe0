"""`localprop plan`."""

import json
from collections.abc import Callable, Sequence

from rich.console import Console

from localprop.cli.common import take_config_files, with_files
from localprop.errors import ConfigError
from localprop.settings.flags import parse
from localprop.settings.plan import PlanConfig
from localprop.system.files import write_text


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `plan`, and imports what predicts. `-c FILE.yaml` sets defaults; flags win."""
    words = ("plan", *argv)
    argv, files = take_config_files(argv)
    config: PlanConfig = parse(PlanConfig, "plan", argv, with_files(PlanConfig(), files, words))
    for path in (config.picture, config.json):
        if path and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.resolve().parent}; make it first")
        if path and path.exists() and not path.is_file():  # such as /dev/stdout, which must not be replaced
            raise ConfigError(f"{path} is no regular file; name a file to write")
    from localprop.planning.picture import draw_plan
    from localprop.planning.reporting import plan_lines, plan_report
    from localprop.planning.settings import plan_model
    from localprop.planning.tables import peak_table, plan_table, processes_table

    def plan() -> int:
        console = Console()
        with console.status("") as status:
            result, title = plan_model(config, lambda setting: status.update(f"simulating {setting.name} ..."))
        console.print(plan_table(result, title))
        if config.parallel:
            console.print(processes_table(result))
        if result.explained:
            console.print()
            console.print(peak_table(result.explained))
            console.print()
        draw_plan(config.picture, result, title)
        if config.json:
            write_text(config.json, json.dumps(plan_report(config, result), indent=1) + "\n")
        for line in plan_lines(config, result):
            console.out(line, highlight=False)
        return 0

    return plan
