/** Draws which experts the tokens of an answer used: the heaviest expert of each token and layer, and the load. */

const SVG = "http://www.w3.org/2000/svg";
const NAMED = 8; // experts that have a colour of their own in the style; more share a circle of hues

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The colour of an expert. */
export function colour(expert, count) {
  if (count <= NAMED) return style(`--e${expert}`);
  return `hsl(${Math.round((360 * expert) / count)} ${style("--hue-tone")})`;
}

/** How many tokens chose each expert of each layer: a list of layers of counts. */
export function load(tokens, count) {
  const routed = tokens.filter((token) => token.routing);
  const layers = routed[0]?.routing.length ?? 0;
  const found = Array.from({ length: layers }, () => new Array(count).fill(0));
  for (const { routing } of routed) {
    routing.forEach((chosen, layer) => {
      for (const [expert] of chosen) found[layer][expert] += 1;
    });
  }
  return found;
}

/** Experts by how many choices fell on them, as a sentence. */
export function summary(counts) {
  const experts = counts[0]?.length ?? 0;
  const totals = Array.from({ length: experts }, (_, expert) => counts.reduce((sum, layer) => sum + layer[expert], 0));
  const all = totals.reduce((sum, total) => sum + total, 0) || 1;
  const share = (total) => `${Math.round((100 * total) / all)} %`;
  const order = totals.map((total, expert) => [total, expert]).sort((a, b) => b[0] - a[0]);
  const idle = order.filter(([total]) => total === 0).length;
  if (experts > NAMED) {
    const most = order.slice(0, 3).map(([total, expert]) => `expert ${expert} (${share(total)})`).join(", ");
    return `Most used over all layers: ${most}.${idle ? ` ${idle} of ${experts} experts were not used.` : ""}`;
  }
  return `Choices over all layers: ${totals.map((total, expert) => `expert ${expert}: ${share(total)}`).join(", ")}.`;
}

/** Draw tokens by layers, each place in the colour of the heaviest expert. */
export function drawMap(canvas, tokens, count, selected) {
  const layers = tokens.find((token) => token.routing)?.routing.length ?? 0;
  // Browsers draw pictures of some 32,000 pixels: of long answers a token gets one, of all others at least three.
  const isLong = tokens.length > 1500;
  const wide = Math.max(isLong ? 1 : 3, Math.min(14, Math.floor(360 / Math.max(1, tokens.length))));
  const high = layers > 12 ? 5 : layers > 4 ? 9 : 16;
  const mark = 5;
  const ratio = isLong ? 1 : Math.min(window.devicePixelRatio || 1, 2);
  const [width, height] = [wide * tokens.length, high * layers + mark];
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.dataset.wide = wide;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const colours = Array.from({ length: count }, (_, expert) => colour(expert, count));
  const gap = wide > 5 ? 1 : 0;
  tokens.forEach((token, column) => {
    token.routing?.forEach((chosen, layer) => {
      context.fillStyle = colours[chosen[0][0]];
      context.fillRect(column * wide, mark + layer * high, wide - gap, high - 1);
    });
    if (token === selected) {
      context.fillStyle = style("--ink");
      context.fillRect(column * wide, 0, wide - gap, mark - 2);
    }
  });
  canvas.setAttribute(
    "aria-label",
    `The heaviest expert of ${tokens.length} tokens in ${layers} layers. ${summary(load(tokens, count))}`,
  );
}

/** Draw layers by experts: the fill is the share of tokens that chose the expert, a ring marks those of a token. */
export function drawLoad(svg, counts, numTokens, selected) {
  const experts = counts[0]?.length ?? 0;
  const [left, top] = [34, 18];
  const wide = Math.max(7, Math.min(40, Math.floor(320 / Math.max(1, experts))));
  const high = counts.length > 12 ? 14 : 20;
  const [width, height] = [left + wide * experts + 2, top + high * counts.length + 2];
  const shapes = [];
  const every = Math.ceil(24 / wide);
  for (let expert = 0; expert < experts; expert += every) {
    shapes.push(text(left + wide * (expert + 0.5), 12, expert, "middle"));
  }
  counts.forEach((layer, row) => {
    if (counts.length <= 12 || row % 4 === 0) shapes.push(text(left - 6, top + high * (row + 0.5) + 4, row, "end"));
    layer.forEach((count, expert) => {
      const rect = shape("rect", { x: left + wide * expert, y: top + high * row, width: wide - 1, height: high - 1 });
      rect.style.setProperty("fill-opacity", (count / Math.max(1, numTokens)).toFixed(3));
      const title = document.createElementNS(SVG, "title");
      title.textContent = `layer ${row}, expert ${expert}: ${count} of ${numTokens} tokens`;
      rect.append(title);
      shapes.push(rect);
    });
  });
  selected?.routing?.forEach((chosen, row) => {
    for (const [expert, weight] of chosen) {
      shapes.push(
        shape("ellipse", {
          class: "ring", cx: left + wide * (expert + 0.5) - 0.5, cy: top + high * (row + 0.5) - 0.5,
          rx: Math.max(2, wide / 2 - 2), ry: high / 2 - 2, "stroke-width": (1 + 2 * weight).toFixed(2),
        }),
      );
    }
  });
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-label", `Load of ${experts} experts in ${counts.length} layers. ${summary(counts)}`);
  svg.replaceChildren(...shapes);
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(x, y, content, anchor) {
  const made = shape("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}
