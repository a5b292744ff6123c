// What lies upon the slide: the heat map and the outlines of the kept patches, in level-0 pixels of one SVG.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export class Overlay {
  // `onChoose(patch)`: a patch was clicked, or Enter was pressed on it.
  constructor(viewer, onChoose) {
    this.viewer = viewer;
    this.onChoose = onChoose;
    this.svg = element("svg", { id: "overlay" });
    this.ground = element("g");
    this.heat = element("image", { preserveAspectRatio: "none", x: 0, y: 0, opacity: 0 });
    this.outlines = element("g", { id: "outlines-group", role: "group", "aria-label": "Kept patches on the slide" });
    this.ground.append(this.heat, this.outlines);
    this.svg.append(this.ground);
    this.patches = [];
    viewer.canvas.append(this.svg);
    viewer.addHandler("update-viewport", () => this.place());
    viewer.addHandler("canvas-click", (event) => {
      const patch = event.quick ? this.at(event.position) : null;
      if (!patch) return;
      event.preventDefaultAction = true;
      onChoose(patch);
    });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("focusin", (event) => this.reveal(this.patches[event.target.dataset.index]));
  }

  // Level-0 pixels to CSS pixels of the viewer.
  place() {
    const item = this.viewer.world.getItemAt(0);
    if (!item) return;
    const from = this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const to = this.viewer.viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0), true);
    this.scale = (to.x - from.x) / item.getContentSize().x;
    this.origin = from;
    this.ground.setAttribute("transform", `matrix(${this.scale} 0 0 ${this.scale} ${from.x} ${from.y})`);
  }

  clear() {
    this.patches = [];
    this.outlines.replaceChildren();
    this.setHeat(null);
  }

  // patches: [{rank, score, row, rect: [x, y, w, h]}], best first.
  show(patches) {
    this.patches = patches.filter((patch) => patch.rect);
    // The best is drawn last, above those it overlaps; the Tab key finds it first.
    const drawn = this.patches.map((patch, index) => {
      const [x, y, width, height] = patch.rect;
      const group = element("g", {
        class: "patch", role: "button", tabindex: index === 0 ? 0 : -1, "data-index": index,
        "aria-label": `Kept patch, rank ${patch.rank}, score ${patch.score.toFixed(3)}`,
      });
      for (const kind of ["under", "line"]) group.append(element("rect", { class: kind, x, y, width, height }));
      const title = element("title");
      title.textContent = `Rank ${patch.rank}, score ${patch.score.toFixed(3)}`;
      group.append(title);
      patch.outline = group;
      return group;
    });
    this.outlines.replaceChildren(...drawn.reverse());
    this.place();
  }

  setHeat(url, size) {
    if (!url) return this.heat.removeAttribute("href");
    this.heat.setAttribute("width", size[0]);
    this.heat.setAttribute("height", size[1]);
    this.heat.setAttribute("href", url);
  }

  setOpacity(opacity) {
    this.heat.setAttribute("opacity", opacity);
  }

  setOutlines(shown) {
    this.outlines.style.display = shown ? "" : "none";
  }

  mark(patch) {
    for (const other of this.patches) {
      const chosen = other === patch;
      other.outline.classList.toggle("chosen", chosen);
      other.outline.setAttribute("tabindex", chosen ? 0 : -1);
    }
    // Above the others; what is moved would lose the focus.
    if (patch?.outline && document.activeElement !== patch.outline) this.outlines.append(patch.outline);
  }

  // The patch at a place in the viewer, of overlapping ones the best.
  at(position) {
    if (this.outlines.style.display === "none") return null;
    const x = (position.x - this.origin.x) / this.scale;
    const y = (position.y - this.origin.y) / this.scale;
    const hit = ({ rect: [left, top, w, h] }) => x >= left && x < left + w && y >= top && y < top + h;
    return this.patches.find(hit) ?? null;
  }

  key(event) {
    const index = Number(event.target.dataset?.index);
    if (Number.isNaN(index)) return;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key === "Enter" || event.key === " ") this.onChoose(this.patches[index]);
    else if (event.key in steps) {
      const next = this.patches[(index + steps[event.key] + this.patches.length) % this.patches.length];
      this.patches[index].outline.setAttribute("tabindex", -1);
      next.outline.setAttribute("tabindex", 0);
      next.outline.focus({ preventScroll: true });
    } else return;
    event.preventDefault();
    event.stopPropagation(); // else OpenSeadragon moves the slide too
  }

  bounds(patch) {
    const width = this.viewer.world.getItemAt(0).getContentSize().x;
    return new OpenSeadragon.Rect(...patch.rect.map((length) => length / width));
  }

  // Brings a patch into view without zooming.
  reveal(patch) {
    if (!patch || !this.viewer.world.getItemAt(0)) return;
    const bounds = this.bounds(patch);
    const view = this.viewer.viewport.getBounds();
    if (!view.containsPoint(bounds.getCenter())) this.viewer.viewport.panTo(bounds.getCenter());
  }

  zoomTo(patch) {
    const bounds = this.bounds(patch);
    const centre = bounds.getCenter();
    const side = Math.max(bounds.width, bounds.height) * 4;
    this.viewer.viewport.fitBounds(new OpenSeadragon.Rect(centre.x - side / 2, centre.y - side / 2, side, side));
  }
}
