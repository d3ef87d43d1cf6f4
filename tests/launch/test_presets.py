from pathlib import Path

import pytest
from torchx.specs.overlays import get_overlay

from mmlrec.errors import ConfigError
from mmlrec.launch.presets import load_preset
from mmlrec.launch.spec import train_app

REPOSITORY = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "torchx.yaml"
    path.write_text(text)
    return path


def test_shipped_presets_are_valid_and_local_needs_no_gpu():
    local = load_preset("local", path=REPOSITORY / "torchx.yaml")
    assert (local.nodes, local.nproc, local.resource.gpu) == (1, 2, 0)
    assert load_preset("slurm-2n", path=REPOSITORY / "torchx.yaml").nodes == 2


def test_current_folder_wins_over_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_preset("local").nproc == 2
    write(tmp_path, "presets: {local: {nproc: 7, resource: {cpu: 1, memMB: 1}}}")
    assert load_preset("local").nproc == 7


def test_command_line_values_replace_and_are_checked(tmp_path):
    path = write(tmp_path, "presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}}}")
    assert load_preset("a", path=path, nodes=3, nproc=5).model_dump() == load_preset("a", path=path).model_dump() | {
        "nodes": 3,
        "nproc": 5,
    }
    with pytest.raises(ConfigError, match=r"command line: nproc: .*greater than or equal to 1"):
        load_preset("a", path=path, nproc=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}}}", r"no preset 'loca'.*Presets: a\."),
        ("presets: {local: {nproc: 2, resource: {cpu: 1, memMB: 1}}}", r"Did you mean 'local'\?"),
        ("presets: {loca: {nprocs: 2, resource: {cpu: 1, memMB: 1}}}", r"torchx\.yaml: presets\.loca\.nprocs: unknown key"),
        ("presets: {loca: {nproc: two, resource: {cpu: 1, memMB: 1}}}", r"presets\.loca\.nproc: .*integer"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1}}}", r"presets\.loca\.resource\.memMB: required"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, env: {A: 1}}}", r"presets\.loca\.env\.A: .*string"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, env: {A B: x}}}", r"presets\.loca\.env\.A B"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}}, loca: {}}", r"'loca' appears twice"),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, nodes: 0}}",
            r"presets\.loca\.nodes: must be a number of .*found 0",
        ),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, nodes: '4:1'}}", r"presets\.loca\.nodes: .*found '4:1'"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, nodes: true}}", r"presets\.loca\.nodes: .*found True"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, imgae: x}}", r"imgae: unknown key\. Did you mean 'image'"),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, mounts: [{type: bind, scr: a, dst: /b}]}}",
            r"presets\.loca\.mounts\.0\.scr: unknown key\. Did you mean 'src'",
        ),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, mounts: [{type: bund, src: a, dst: b}]}}",
            r"(?s)mounts\.0\.type: .*'bind'.*mounts\.0\.dst: ",
        ),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, rdzv_conf: {join_timout: 3}}}",
            r"presets\.loca\.rdzv_conf\.join_timout: unknown key\. Did you mean 'join_timeout'",
        ),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, rdzv_conf: {timeout: 3}}}",
            r"presets\.loca\.rdzv_conf\.timeout: unknown key",
        ),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, metadata: {kubernets: {}}}}",
            r"metadata\.kubernets: unknown key\. Did you mean 'kubernetes'",
        ),
        (
            "presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, scheduler: {name: slurm, option: {}}}}",
            r"scheduler\.option: unknown key\. Did you mean 'options'",
        ),
        ("presets: {}", r"presets: .*at least 1"),
        ("preset: {}", r"preset: unknown key\. Did you mean 'presets'"),
        ("", r"presets: required"),
    ],
)
def test_wrong_files_name_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset("loca", path=path)
    assert "torchx.yaml" in str(caught.value)


def test_a_mistake_in_another_preset_is_reported_too(tmp_path):
    path = write(
        tmp_path, "presets: {a: {nproc: 1, resource: {cpu: 1, memMB: 1}}, b: {nproc: 0, resource: {cpu: 1, memMB: 1}}}"
    )
    with pytest.raises(ConfigError, match=r"presets\.b\.nproc"):
        load_preset("a", path=path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_preset("a", path=tmp_path / "none.yaml")


def test_every_key_reaches_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("dataset: {path: d}")
    path = write(
        tmp_path,
        """
presets:
  a:
    nodes: "1:4"
    nproc: 8
    resource: {cpu: 64, gpu: 8, memMB: 1000}
    image: registry.example/mmlrec:1
    mounts:
      - {type: bind, src: /fast, dst: /mmlrec/data, readonly: true}
      - {type: volume, src: runs, dst: /mmlrec/runs}
      - {type: device, src: /dev/infiniband, dst: /dev/infiniband}
    metadata: {kubernetes: {spec: {nodeSelector: {pool: a100}}}}
    env: {NCCL_SOCKET_IFNAME: "eth0,eth1", GLOO_SOCKET_IFNAME: eth0, NCCL_DEBUG: WARN}
    max_retries: 2
    max_restarts: 3
    shutdown_timeout: 40
    rdzv_port: 29700
    rdzv_conf: {join_timeout: 900, last_call_timeout: 5, keep_alive_max_attempt: 4}
""",
    )
    shape = load_preset("a", path=path)
    assert (shape.least_nodes, shape.most_nodes) == (1, 4)
    (role,) = train_app(shape, config="c.yaml", overrides=[]).roles
    assert (role.num_replicas, role.min_replicas, role.max_retries, role.image) == (4, 1, 2, "registry.example/mmlrec:1")
    assert [(type(mount).__name__, mount.dst_path) for mount in role.mounts] == [
        ("BindMount", "/mmlrec/data"),
        ("VolumeMount", "/mmlrec/runs"),
        ("DeviceMount", "/dev/infiniband"),
    ]
    assert [mount.read_only for mount in role.mounts[:2]] == [True, False]
    for words in (
        "export NCCL_SOCKET_IFNAME=eth0,eth1;",
        "--nnodes 1:4 --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 40 ",
        ":29700",
        "--rdzv-conf is_host=$$first,join_timeout=900,last_call_timeout=5,keep_alive_max_attempt=4 ",
    ):
        assert words in role.args[1]
    pod = get_overlay(role, "kubernetes", "V1Pod")["spec"]
    assert pod == {"terminationGracePeriodSeconds": 45, "nodeSelector": {"pool": "a100"}}


def test_a_job_of_fixed_size_is_not_restarted_in_place():
    for name in ("local", "slurm-2n", "kubernetes-2n"):
        assert load_preset(name, path=REPOSITORY / "torchx.yaml").restarts == 0


def test_a_job_whose_nodes_come_and_go_is_restarted_in_place_unless_told(tmp_path):
    path = write(tmp_path, "presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}, nodes: '1:4'}}")
    assert load_preset("a", path=path).restarts == 3
    assert load_preset("a", path=path, nodes=4).restarts == 0
    path = write(tmp_path, "presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}, nodes: '1:4', max_restarts: 0}}")
    assert load_preset("a", path=path).restarts == 0


def test_the_number_of_nodes_is_read_from_the_command_line(tmp_path):
    path = write(tmp_path, "presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}}}")
    assert load_preset("a", path=path, nodes="3").nodes == 3
    assert load_preset("a", path=path, nodes="2:3").nodes == "2:3"
    with pytest.raises(ConfigError, match=r"command line: nodes: must be a number of nodes.*found '2-3'"):
        load_preset("a", path=path, nodes="2-3")
