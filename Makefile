# make demo      a virtual environment, the installation, and a first video
# make test      all tests
# make check     ruff and mypy
# make package   wheel, sdist and editable install, each tried from outside the checkout
# make toyland   train the embedded model again from nothing
# make probes    train the probes again, for the embedded VAE, ship them and measure them

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed

.PHONY: demo test check package toyland probes

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/vgen generate "a red ball bounces on the grass" --seed 7 --output outputs/demo.mp4 --force
	@echo "Your video: $(CURDIR)/outputs/demo.mp4"

test: $(DEVELOPED)
	$(BIN)/python -m pytest

check: $(DEVELOPED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

package: $(DEVELOPED)
	scripts/check_packaging.sh $(BIN)/python

toyland: $(INSTALLED)
	$(BIN)/vgen train vae --minutes 28 -o runs/vae
	$(BIN)/vgen train text --steps 1500 -o runs/text
	$(BIN)/vgen train base --vae runs/vae/vae --text runs/text --clips 1x128x128=16000 --batch-size 48 --minutes 35 \
	  -o runs/images
	$(BIN)/vgen train base --vae runs/vae/vae --start runs/images --batch-size 12 --minutes 65 -o runs/videos \
	  --clips 17x128x128=5000 --clips 33x128x128=200 --clips 17x128x192=200
	$(BIN)/vgen train base --vae runs/vae/vae --start runs/videos --batch-size 16 --minutes 200 -o runs/longer \
	  --clips 17x128x128=22000 --clips 1x128x128=24000 --clips 33x240x240=256 --clips 17x128x192=160 \
	  --learning-rate 1.3e-3 --decay 0.95 --time-mean 1.4 --time-spread 1.1
	$(BIN)/vgen train base --vae runs/vae/vae --start runs/longer --batch-size 16 --minutes 265 -o runs/large \
	  --clips 17x128x128=16384 --clips 1x128x128=16384 --clips 1x240x240=4096 --clips 33x240x240=1536 \
	  --learning-rate 1.3e-3 --decay 0.95 --time-mean 1.2 --time-spread 1.2
	$(BIN)/vgen train export --vae runs/vae/vae --base runs/large -o vgen/toyland/checkpoint

probes: $(INSTALLED)
	$(BIN)/vgen train probes --minutes 120 --passed-clips 2560 --passed-heads 4096 --passed-turns 3200 --decay 0.6 -o runs/probes
	cp runs/probes/probes/* vgen/toyland/probes/
	$(BIN)/python benchmarks/probes.py --clips 512 --heads 128 --folder runs/probes-test > runs/probes.json
	mv runs/probes.json benchmarks/results/probes.json
