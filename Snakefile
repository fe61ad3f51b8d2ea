# The batch: shared checkpoints -> chapters (each with its report). `compendium run` drives this file;
# `snakemake --cores 4 --config preset=smoke chapters=flat` works as well.
import sys

from compendium.runner.plan import planned_jobs
from compendium.runner.slurm import rule_resources, zoo_resources

JOBS = {str(job.folder): job for job in planned_jobs(config)}
ZOO = {name for job in JOBS.values() for name in job.zoo}
PYTHON = sys.executable


def zoo_card(name):
    from compendium.zoo.store import folder_of

    return f"{folder_of(name)}/README.md"


rule all:
    input:
        [f"{run}/record.json" for run in JOBS],


# A checkpoint appears in the zoo whole or not at all, so its card stands for all of it.
for checkpoint in sorted(ZOO):

    rule:
        name:
            "zoo_" + checkpoint.replace("-", "_")
        output:
            zoo_card(checkpoint),
        params:
            name=checkpoint,
        resources:
            **zoo_resources(checkpoint, JOBS.values()),
        shell:
            "exec {PYTHON} -c 'from compendium.runner.execute import build_checkpoint; build_checkpoint()' {params.name}"


rule chapter:
    input:
        lambda wildcards: [zoo_card(name) for name in JOBS[wildcards.run].zoo],
    output:
        "{run}/record.json",
    wildcard_constraints:
        run=r"\.compendium/runs/.+",
    resources:
        **rule_resources(JOBS),
    shell:
        "exec {PYTHON} -c 'from compendium.runner.warm import main; main()' {wildcards.run}.json"
