#!/usr/bin/env bash
# Install vgen as a wheel, from its sdist, and editable, each into a virtual environment of its own, and use it from
# outside the checkout. The libraries are those of the Python given, so that it takes a minute and no download of torch.
set -euo pipefail

cd "$(dirname "$0")/.."
checkout=$PWD
python=$PWD/${1:-.venv/bin/python}
libraries=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What is committed or about to be: no caches, runs or virtual environments.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$work/source"
cd "$work"

build() {
    (cd source && "$python" -c "from setuptools import build_meta; build_meta.build_$1('$work/$1')") >build.log 2>&1 ||
        { cat build.log && exit 1; }
}

try() {
    local name=$1
    shift
    echo "$name:"
    "$python" -m venv "$name"
    "$name/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
    # After what is installed here, and without the .pth files there, one of which may be an editable vgen.
    echo "$libraries" >"$("$name/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/libraries.pth"
    mkdir "$name/elsewhere"
    (
        cd "$name/elsewhere"
        ../bin/vgen --version
        ../bin/vgen generate "a red ball" --dry-run >/dev/null
        CHECKOUT=$checkout ../bin/python - <<'CODE'
import importlib.resources
import importlib.util
import os
import pathlib

import vgen.cli.generate
import vgen.pipelines.run

package = pathlib.Path(vgen.__file__).parent
assert not package.is_relative_to(os.environ["CHECKOUT"]), package
for name in ("py.typed", "checkpoints.yaml"):
    assert (importlib.resources.files("vgen") / name).is_file(), name
for name in ("cli", "pipelines"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed outside vgen"
CODE
        if [ -e ../../source/vgen/toyland/checkpoint/model_index.json ]; then
            ../bin/vgen generate "a red ball" --frames 1 --steps 1 -o ball.mp4
        fi
    )
}

mkdir wheel sdist
build wheel
build sdist
try from-wheel wheel/*.whl
try from-sdist sdist/*.tar.gz
try editable --editable ./source
echo "Wheel, sdist and editable install work."
