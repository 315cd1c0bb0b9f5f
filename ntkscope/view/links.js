// The linked view: a click on a direction shows its examples, layers and gate share; a click on an example shows its directions.
(function () {
  "use strict";
  const section = document.getElementById("explore");
  if (!section) return;
  const data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
  const modePane = section.querySelector(".mode-pane");
  const examplePane = section.querySelector(".example-pane");
  const modeInput = section.querySelector("input[name='mode']");
  const exampleInput = section.querySelector("input[name='example']");
  const announcement = section.querySelector("[aria-live]");
  const position = new Map(data.ids.map(function (id, k) { return [id, k]; }));
  const pictureOf = new Map(data.pictures ? data.pictures.examples.map(function (example, k) { return [example, k]; }) : []);
  const bytes = data.pictures ? Uint8Array.from(atob(data.pictures.data), function (letter) { return letter.charCodeAt(0); }) : null;
  const plots = []; // {plot, figure, kind}
  let chosenMode = null; // position in the columns of data
  let chosenExample = null;
  let highlighted = []; // examples to ring in the scene

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function percent(thousandths) {
    return thousandths === null ? "unknown" : (thousandths / 10).toFixed(1) + "\u00a0%";
  }

  function picture(example, side) {
    if (!pictureOf.has(example)) return null;
    const { height, width, channels } = data.pictures;
    const canvas = element("canvas", { width: width, height: height, className: "picture" });
    canvas.style.width = side * Math.min(1, width / height) + "px";
    canvas.style.height = side * Math.min(1, height / width) + "px";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "input of example " + data.ids[example]);
    const image = new ImageData(width, height);
    const start = pictureOf.get(example) * height * width * channels;
    for (let k = 0; k < height * width; k++) {
      for (let c = 0; c < 3; c++) image.data[4 * k + c] = bytes[start + channels * k + Math.min(c, channels - 1)];
      image.data[4 * k + 3] = 255;
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  // Its length is relative to the longest of its list: the shares of single examples are often too small to see.
  function bar(thousandths, colour, longest) {
    const fill = element("span", { className: "fill " + colour });
    fill.style.width = 100 * Math.abs(thousandths || 0) / (longest || 1) + "%";
    return element("span", { className: "bar", ariaHidden: "true" }, fill);
  }

  function longestOf(shares) {
    return Math.max(...shares.map(function (share) { return Math.abs(share || 0); }), 1);
  }

  function labelWords(example) {
    const words = [];
    if (data.labels) words.push("label " + data.labels[example]);
    if (data.true_labels && data.labels && data.true_labels[example] !== data.labels[example]) words.push("truly " + data.true_labels[example]);
    else if (data.is_noise && data.is_noise[example]) words.push("planted wrong");
    return words.join(", ");
  }

  function row(button, bars, tail) {
    return element("li", {}, button, ...bars, element("span", { className: "number" }, tail));
  }

  function facts(pairs) {
    const list = element("dl", { className: "brief" });
    for (const [name, value] of pairs) list.append(element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value })));
    return list;
  }

  function link(text, act) {
    const button = element("button", { type: "button", className: "link", textContent: text });
    button.addEventListener("click", act);
    return button;
  }

  function nearest(sorted, wanted) {
    let best = 0;
    for (let k = 1; k < sorted.length; k++) if (Math.abs(sorted[k] - wanted) < Math.abs(sorted[best] - wanted)) best = k;
    return best;
  }

  function layerList(number) {
    if (!data.layers) return [element("h4", { textContent: "Layers and gate" }), element("p", { className: "aside", textContent: section.dataset.noLayers })];
    const at = nearest(data.layers.modes, number);
    const list = element("ul", { className: "rows" });
    const longest = longestOf(data.layers.share[at]);
    data.layers.names.forEach(function (name, k) {
      const share = data.layers.share[at][k];
      const kept = data.layers.kept[at][k];
      list.append(row(element("span", { className: "name", textContent: name }), [bar(share, "neutral", longest)], percent(share) + (kept === null ? "" : ", gate keeps " + percent(kept))));
    });
    const shown = data.layers.modes[at];
    const words = "Share of the direction's kernel in each layer, and how much of that the gate keeps; direction " + shown + " of the window that ends at the audited step " + data.layers.step +
      (shown === number ? "" : ", the nearest one kept") + (data.layers.num_left_out ? "; " + data.layers.num_left_out + " smaller layers left out" : "") + ".";
    return [element("h4", { textContent: "Layers and gate" }), list, element("p", { className: "aside", textContent: words })];
  }

  function showMode(at) {
    chosenMode = at;
    const number = data.modes[at];
    modeInput.value = number;
    const learned = data.learned_at[at];
    const pairs = [
      ["share of its loss removed (ω)", data.omega[at] === null ? "unknown" : String(data.omega[at])],
      ["counts as", data.is_signal[at] ? "signal" : "reservoir"],
      ["share of the initial error along it", percent(data.energy[at])],
      ["half of its loss was gone by", learned === null ? "never" : "step " + learned],
    ];
    if (data.mode_labels) pairs.push(["lies mostly on", data.mode_labels[at].map(function (entry) { return "label " + entry[0] + " (" + percent(entry[1]) + ")"; }).join(", ")]);
    const list = element("ul", { className: "rows" });
    const longest = longestOf(data.mode_examples[at].map(function (entry) { return entry[1]; }));
    for (const [example, share] of data.mode_examples[at]) {
      const button = link("#" + data.ids[example], function () { choose("example", example); });
      const seen = picture(example, 32);
      if (seen) button.prepend(seen);
      list.append(row(button, [bar(share, data.is_signal[at] ? "signal" : "reservoir", longest)], percent(share) + (labelWords(example) ? " · " + labelWords(example) : "")));
    }
    modePane.replaceChildren(facts(pairs), element("h4", { textContent: "Its examples" }), list, ...layerList(number));
  }

  function showExample(example) {
    chosenExample = example;
    exampleInput.value = data.ids[example];
    const pairs = [];
    if (data.labels) pairs.push(["given label", labelWords(example).replace("label ", "")]);
    pairs.push(["share of its error in the reservoir", percent(data.reservoir_share[example])]);
    const half = data.half_time[example];
    pairs.push(["half of its error was gone at", half === null ? "never (or unknown)" : "optimizer time " + half]);
    pairs.push(["loss at the window's end", data.loss[example] === null ? "unknown" : String(data.loss[example])]);
    const list = element("ul", { className: "rows" });
    const longest = longestOf(data.example_modes[example].map(function (entry) { return entry[1]; }));
    for (const [at, share] of data.example_modes[example]) {
      const button = link("direction " + data.modes[at], function () { choose("mode", at); });
      const side = data.is_signal[at] ? "signal" : "reservoir";
      list.append(row(button, [bar(share, side, longest)], percent(share) + " · " + side + ", ω " + (data.omega[at] === null ? "unknown" : data.omega[at])));
    }
    const seen = picture(example, 96);
    examplePane.replaceChildren(...(seen ? [seen] : []), facts(pairs), element("h4", { textContent: "Its directions" }), list);
  }

  // Marks the choice in the figures: rings around examples, a ring on the mode.
  function mark() {
    for (const { plot, name, trace } of plots) {
      if (name === "eigenstructure") {
        const found = { x: [], y: [], z: [] };
        for (const points of plot.data.slice(0, trace)) {
          (points.customdata || []).forEach(function (entry, k) {
            if (!highlighted.includes(position.get(entry[0]))) return;
            for (const letter of "xyz") found[letter].push(points[letter][k]);
          });
        }
        Plotly.restyle(plot, { x: [found.x], y: [found.y], z: [found.z] }, [trace]);
      } else if (name === "spectrum" && chosenMode !== null) {
        Plotly.restyle(plot, { x: [[data.modes[chosenMode]]], y: [[data.omega[chosenMode]]] }, [trace]);
      }
    }
  }

  function choose(kind, at) {
    if (kind === "mode") {
      showMode(at);
      highlighted = data.mode_examples[at].map(function (entry) { return entry[0]; });
      announcement.textContent = "Direction " + data.modes[at] + " chosen; its examples are ringed in the 3D figure.";
    } else {
      showExample(at);
      highlighted = [at];
      announcement.textContent = "Example " + data.ids[at] + " chosen; it is ringed in the 3D figure.";
    }
    section.dataset.kind = kind;
    section.dataset.chosen = kind + " " + (kind === "mode" ? data.modes[at] : data.ids[at]);
    mark();
  }

  // A click far from the section brings its panel to the click, until it is closed.
  function dock(clickedAt) {
    const seen = section.getBoundingClientRect();
    if (section.classList.contains("docked") || (seen.top < innerHeight * 0.6 && seen.bottom > innerHeight * 0.4)) return;
    section.parentElement.style.minHeight = section.parentElement.offsetHeight + "px"; // the page must not jump
    section.classList.add("docked");
    section.classList.toggle("left", clickedAt > innerWidth / 2); // the click must stay in sight
  }

  function undock() {
    section.classList.remove("docked");
    section.parentElement.style.minHeight = "";
  }

  function clicked(kind, point, clickedAt) {
    if (kind === "mode" && typeof point.x === "number") {
      const at = nearest(data.modes, Math.round(point.x));
      choose("mode", at);
      dock(clickedAt);
    } else if (kind === "example" && point.customdata && position.has(String(point.customdata[0]))) {
      choose("example", position.get(String(point.customdata[0])));
      dock(clickedAt);
    }
  }

  document.addEventListener("drawn", async function (event) {
    const figure = event.target;
    const plot = event.detail.plot;
    const name = figure.dataset.figure;
    const kind = section.dataset[name.replace(/_(\w)/g, function (_, letter) { return letter.toUpperCase(); }) + "Click"];
    if (!kind) return;
    plot.on("plotly_click", function (event) { clicked(kind, event.points[0], event.event ? event.event.clientX : 0); });
    if (name !== "eigenstructure" && name !== "spectrum") return;
    const ring = { color: ringColour(), size: name === "spectrum" ? 14 : 11, symbol: "circle-open", line: { width: 3 } };
    const added = { mode: "markers", marker: ring, showlegend: false, hoverinfo: "skip", x: [], y: [] };
    await Plotly.addTraces(plot, name === "spectrum" ? added : { ...added, type: "scatter3d", z: [] });
    plots.push({ plot: plot, name: name, trace: plot.data.length - 1 });
    plot.on("plotly_animated", mark);
    mark();
  });

  // Rings have the colour of the page's text.
  function ringColour() {
    return getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
  }

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", function () {
    for (const { plot, trace } of plots) Plotly.restyle(plot, { "marker.color": ringColour() }, [trace]);
  });

  modeInput.addEventListener("change", function () {
    const wanted = Number(modeInput.value);
    if (Number.isFinite(wanted) && modeInput.value !== "") choose("mode", nearest(data.modes, wanted));
  });
  exampleInput.addEventListener("change", function () {
    const at = position.get(exampleInput.value.replace(/^#/, "").trim());
    exampleInput.setCustomValidity(at === undefined ? "There is no example of this name." : "");
    if (at === undefined) exampleInput.reportValidity();
    else choose("example", at);
  });
  section.querySelector(".close").addEventListener("click", undock);
  document.addEventListener("keydown", function (event) { if (event.key === "Escape") undock(); });
  for (const button of document.querySelectorAll("[data-example]")) {
    const at = Number(button.dataset.example);
    const seen = picture(at, 28);
    if (seen) button.prepend(seen);
    button.addEventListener("click", function () { choose("example", at); dock(0); });
  }
  if (data.modes.length) showMode(0);
  if (data.first.length) showExample(data.first[0]);
  highlighted = chosenExample === null ? [] : [chosenExample];
})();
