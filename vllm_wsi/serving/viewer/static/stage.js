// OpenSeadragon on one slide, or on a grey sheet of the slide's size where there is no image.

import * as api from "./api.js";

const GREY = "data:image/gif;base64,R0lGODlhAQABAIAAAPX19QAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw==";

export function createStage(element) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const viewer = OpenSeadragon({
    element,
    drawer: "canvas",
    showNavigationControl: false,
    loadTilesWithAjax: true,
    imageLoaderLimit: 3, // of the six connections that a browser opens: two are for the strip, one for the chat
    maxZoomPixelRatio: 4,
    minZoomImageRatio: 0.6,
    visibilityRatio: 0.3,
    springStiffness: 9,
    animationTime: still ? 0 : 0.5,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { pinchRotate: false },
  });
  viewer.addHandler("canvas-key", (event) => {
    // The overlay knows neither turned nor mirrored slides.
    if (["r", "R", "f"].includes(event.originalEvent.key)) event.preventDefaultAction = true;
  });
  viewer.canvas.setAttribute("role", "application"); // it takes the arrow keys, and a label needs a role
  viewer.canvas.setAttribute("aria-label", "Slide: arrow keys move, + and - zoom, 0 shows the whole slide");
  return viewer;
}

const nextFrame = () => new Promise(requestAnimationFrame);

// Opens a slide as `GET /v1/wsi/slide` describes it; resolves when its first view is laid out.
export async function openSlide(viewer, url, facts) {
  const [width, height] = facts.extent_px;
  const { tiles } = facts;
  const source = tiles
    ? {
        width, height, tileSize: tiles.size_px, tileOverlap: 0, minLevel: tiles.min_level, maxLevel: tiles.max_level,
        getTileUrl: (level, x, y) => api.address("wsi/tile", { url, level, x, y, version: tiles.version }),
      }
    : { width, height, tileWidth: width, tileHeight: height, tileOverlap: 0, minLevel: 0, maxLevel: 0, getTileUrl: () => GREY };
  await new Promise((resolve, reject) => {
    viewer.close();
    viewer.addOnceHandler("open", resolve);
    viewer.addOnceHandler("open-failed", (event) => reject(new Error(event.message)));
    viewer.open({ tileSource: source, loadTilesWithAjax: Boolean(tiles), ajaxHeaders: tiles ? api.headers() : {} });
  });
  // What stands below the slide may have moved with it; OpenSeadragon sees that one frame later.
  await nextFrame();
  await nextFrame();
  viewer.viewport.goHome(true);
}

// Makes a change that may move what stands below the slide. A slide that was shown whole stays so.
export async function keepWhole(viewer, change) {
  const shown = viewer.world.getItemAt(0) ? viewer.viewport.getBounds() : null;
  const home = shown && viewer.viewport.getHomeBounds();
  change();
  if (!shown || Math.abs(shown.width - home.width) > 1e-6 || shown.getCenter().distanceTo(home.getCenter()) > 1e-6) return;
  await nextFrame();
  await nextFrame();
  viewer.viewport.goHome(true);
}

// The bar in the corner: a round number of micrometres.
export function drawScale(viewer, bar, mpp) {
  const item = viewer.world.getItemAt(0);
  bar.hidden = !item || !mpp;
  if (bar.hidden) return;
  const umPerPx = (mpp * item.getContentSize().x) / (viewer.viewport.getZoom(true) * viewer.viewport.getContainerSize().x);
  const aim = umPerPx * 120;
  const power = 10 ** Math.floor(Math.log10(aim));
  const length = [5, 2, 1].find((step) => step * power <= aim) * power;
  bar.style.width = `${length / umPerPx}px`;
  bar.firstElementChild.textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(1))} µm`;
}
