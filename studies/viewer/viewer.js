(() => {
  "use strict";
  // This text stands in each viewer of a page; it starts those that are there and not started.
  document.querySelectorAll(".mapkg-viewer:not([data-started])").forEach(start);

  function start(viewer) {
    const find = (selector) => viewer.querySelector(selector);
    const data = JSON.parse(find("script[type='application/json']").textContent);
    const colors = data.colors.match(/.{6}/g).map((digits) => "#" + digits);
    const figures = [...viewer.querySelectorAll("figure")];
    const [molecule, layer, head, threshold] = ["molecule", "layer", "head", "threshold"].map(
      (name) => find(`[name=${name}]`),
    );
    const mark = find(".mapkg-bar .threshold");
    const markText = mark.appendChild(mark.querySelector("text").cloneNode());
    markText.classList.add("now");

    // Three characters per bond, see _packed in __init__.py.
    function unpacked(codes, bond) {
      const n = parseInt(codes.slice(3 * bond, 3 * bond + 3), 36);
      return Number.isNaN(n) ? null : Number(`${100 + (n % 900)}e${Math.floor(n / 900) - 12}`);
    }

    function largest(bond) {
      const heads = data.ratios[molecule.selectedIndex][layer.value];
      const chosen = head.value === "" ? heads : [heads[head.value]];
      const ratios = chosen.map((codes) => unpacked(codes, bond)).filter((r) => r !== null);
      return ratios.length ? Math.max(...ratios) : null;
    }

    function color(ratio) {
      return ratio === null
        ? data.none
        : colors[data.bounds.filter((bound) => bound <= ratio).length];
    }

    function number(ratio) {
      return ratio.toLocaleString("en", { maximumSignificantDigits: 3 });
    }

    // What is on paper stays in the attributes of the drawing; only what a style sheet for
    // screens reads is written here.
    function paint(band, limit) {
      const ratio = largest(band.dataset.bond);
      const isOutlined = ratio !== null && ratio >= limit;
      band.style.setProperty("--color", color(ratio));
      band.dataset.now = ratio === null ? "none" : isOutlined ? "outlined" : "";
      const title = band.querySelector("title") ?? band.appendChild(newTitle());
      title.textContent = `bond ${band.dataset.bond}: ${ratio === null ? "no ratio" : number(ratio)}`;
      return isOutlined;
    }

    function newTitle() {
      return document.createElementNS("http://www.w3.org/2000/svg", "title");
    }

    function markThreshold(limit) {
      const [low, high] = data.limits;
      const place = Math.min(1, Math.max(0, Math.log(limit / low) / Math.log(high / low)));
      const [left, width] = data.bar;
      mark.style.setProperty("--x", `${left + width * place}px`);
      markText.style.textAnchor = place < 0.25 ? "start" : place > 0.75 ? "end" : "middle";
      markText.textContent = `outlined from ${number(limit)}`;
    }

    function draw() {
      const limit = data.thresholds[threshold.value];
      const chosen = molecule.selectedIndex;
      figures.forEach((figure, i) => figure.toggleAttribute("data-shown", i === chosen));
      const bands = [...figures[chosen].querySelectorAll("[data-bond]")];
      const outlined = bands.filter((band) => paint(band, limit));
      outlined.forEach((band) => band.parentNode.append(band)); // above its neighbours
      markThreshold(limit);
      layer.parentNode.querySelector("b").textContent = layer.value;
      threshold.parentNode.querySelector("b").textContent = number(limit);
      threshold.setAttribute("aria-valuetext", number(limit));
      find(".place").textContent = `${chosen + 1} of ${figures.length}`;
      find(".status").textContent =
        `${outlined.length} of ${bands.length} bonds at or above ${number(limit)} ` +
        `in layer ${layer.value}, ${head.selectedOptions[0].textContent}`;
    }

    function step(by) {
      molecule.selectedIndex = (molecule.selectedIndex + by + figures.length) % figures.length;
      draw();
    }

    find("[name=previous]").addEventListener("click", () => step(-1));
    find("[name=next]").addEventListener("click", () => step(1));
    [molecule, layer, head, threshold].forEach((input) => input.addEventListener("input", draw));
    viewer.querySelectorAll("[hidden]").forEach((part) => (part.hidden = false));
    viewer.dataset.started = "";
    draw();
  }
})();
