"use strict";
// Cosine similarity of all patches of a picture to a chosen one, in each model's own grid. A map's features lie in its
// frame as base64: one signed byte per channel, cell by cell, row by row.
(() => {
  const scale = document.querySelector(".ramp.similarity");
  const ramp = scale.dataset.stops.split(" ").map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function colour(share) {
    const place = share * (ramp.length - 1);
    const below = Math.min(Math.floor(place), ramp.length - 2);
    return ramp[below].map((low, i) => Math.round(low + (ramp[below + 1][i] - low) * (place - below)));
  }

  class Patches {
    constructor(text, grid) {
      this.codes = Int8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      this.count = grid * grid;
      this.channels = this.codes.length / this.count;
      this.lengths = Array.from({ length: this.count }, (_, cell) => Math.sqrt(this.dot(cell, cell)));
    }

    dot(one, other) {
      let sum = 0;
      for (let i = 0; i < this.channels; i++) {
        sum += this.codes[one * this.channels + i] * this.codes[other * this.channels + i];
      }
      return sum;
    }

    // A patch of zeros is like none.
    cosines(chosen) {
      return this.lengths.map((length, cell) => this.dot(cell, chosen) / (length * this.lengths[chosen] || 1));
    }
  }

  // A picture's view, or a model's map of it.
  class Frame {
    constructor(row, element, finest) {
      this.row = row;
      this.element = element;
      this.grid = Number(element.dataset.grid || finest);
      if (element.dataset.features) {
        this.canvas = this.add("canvas", "similarity");
        this.canvas.width = this.canvas.height = this.grid;
        this.words = this.add("output", "cosine");
      }
      this.cursor = this.add("div", "cursor");
      this.mark = this.add("div", "mark");
      this.at = [0.5, 0.5];
      const what = element.querySelector("img").alt;
      element.tabIndex = 0;
      element.setAttribute("role", "application");
      element.setAttribute("aria-label", what + ": arrow keys choose a patch, Enter compares, Escape shows the maps");
      this.listen();
    }

    add(kind, name) {
      const made = document.createElement(kind);
      made.className = name;
      return this.element.appendChild(made);
    }

    listen() {
      const on = (name, act) => this.element.addEventListener(name, act);
      on("click", (event) => this.choose(this.pointed(event)));
      on("pointermove", (event) => this.row.read(this.pointed(event)));
      on("pointerleave", () => this.row.read(null));
      on("focus", () => this.put(this.cursor, this.at));
      on("keydown", (event) => this.press(event));
    }

    // Column and row of the cell at a place, which is given as shares of the sides.
    cell(place) {
      return place.map((share) => Math.min(Math.max(Math.floor(share * this.grid), 0), this.grid - 1));
    }

    pointed(event) {
      const box = this.element.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    }

    put(box, place) {
      const [column, row] = this.cell(place);
      Object.assign(box.style, {
        left: (100 * column) / this.grid + "%",
        top: (100 * row) / this.grid + "%",
        width: 100 / this.grid + "%",
        height: 100 / this.grid + "%",
      });
    }

    choose(place) {
      this.at = this.cell(place).map((i) => (i + 0.5) / this.grid);
      this.put(this.cursor, this.at);
      this.row.show(place);
    }

    press(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in STEPS) {
        this.at = this.cell(this.at.map((share, i) => share + STEPS[event.key][i] / this.grid));
        this.at = this.at.map((i) => (i + 0.5) / this.grid);
        this.put(this.cursor, this.at);
        this.row.read(this.at);
      } else if (event.key === "Enter" || event.key === " ") {
        this.row.show(this.at);
      } else if (event.key === "Escape") {
        this.row.clear();
      } else {
        return;
      }
      event.preventDefault();
    }

    show(place) {
      this.put(this.mark, place);
      if (!this.canvas) return;
      this.patches ??= new Patches(this.element.dataset.features, this.grid);
      const [column, row] = this.cell(place);
      this.canvas.cosines = this.patches.cosines(row * this.grid + column);
      this.range = [Math.min(...this.canvas.cosines), Math.max(...this.canvas.cosines)];
      this.paint();
      this.read(null);
    }

    // From the least similar patch of this map to the most similar one, the chosen patch itself.
    paint() {
      const pen = this.canvas.getContext("2d");
      const image = pen.createImageData(this.grid, this.grid);
      const [least, most] = this.range;
      this.canvas.cosines.forEach((cosine, i) => {
        image.data.set([...colour(most > least ? (cosine - least) / (most - least) : 1), 255], 4 * i);
      });
      pen.putImageData(image, 0, 0);
    }

    read(place) {
      if (!this.range) return;
      const [column, row] = place ? this.cell(place) : [0, 0];
      this.words.textContent = place
        ? this.canvas.cosines[row * this.grid + column].toFixed(3)
        : this.range.map((cosine) => cosine.toFixed(2)).join(" to ");
    }
  }

  class Row {
    constructor(article) {
      this.article = article;
      const elements = [...article.querySelectorAll(".frame")];
      const finest = Math.max(...elements.map((element) => Number(element.dataset.grid || 1)));
      this.frames = elements.map((element) => new Frame(this, element, finest));
      const back = document.createElement("button");
      back.className = "back";
      back.textContent = "back to the maps";
      back.addEventListener("click", () => this.clear());
      article.querySelector("h3").append(back);
    }

    show(place) {
      this.article.classList.add("chosen");
      this.frames.forEach((frame) => frame.show(place));
    }

    read(place) {
      if (this.article.classList.contains("chosen")) this.frames.forEach((frame) => frame.read(place));
    }

    clear() {
      this.article.classList.remove("chosen");
    }
  }

  const rows = [...document.querySelectorAll("article")].map((article) => new Row(article));
  for (const choice of document.querySelectorAll("input[name=shown]")) {
    choice.addEventListener("change", () => rows.forEach((row) => row.clear()));
  }
  document.body.classList.add("live");
})();
