// Read-out under the pointer on line charts, and <details> opened for printing. The page is complete without it.
(function () {
  var doc = document, box = doc.createElement('div');
  box.id = 'read';
  box.setAttribute('aria-hidden', 'true');
  doc.body.appendChild(box);

  doc.querySelectorAll('svg[data-x]').forEach(function (svg) {
    // left, right (pixels of the view box), first step, last step, width of the view box, top, bottom
    var b = svg.dataset.b.split(',').map(Number), steps = svg.dataset.x.split(',').map(Number);
    var lines = svg.dataset.s.split('|').map(function (text) {
      var part = text.split('~');
      return { name: part[0], colour: part[1], values: part[2].split(',') };
    });
    // A <title> would pop up as the browser's own tooltip over the read-out; its text moves to aria-label.
    var title = svg.querySelector('title');
    svg.setAttribute('aria-label', title.textContent);
    svg.removeAttribute('aria-labelledby');
    svg.setAttribute('aria-describedby', svg.querySelector('desc').id);
    title.remove();
    var hair = doc.createElementNS(svg.namespaceURI, 'line');
    hair.setAttribute('class', 'hair');
    hair.setAttribute('y1', b[5]);
    hair.setAttribute('y2', b[6]);
    svg.appendChild(hair);

    function hide() { box.style.visibility = hair.style.visibility = 'hidden'; }
    svg.addEventListener('pointerleave', hide);
    svg.addEventListener('pointermove', function (event) {
      var area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * b[4], near = 0;
      if (at < b[0] - 8 || at > b[1] + 8) { return hide(); }
      var step = b[2] + (at - b[0]) / (b[1] - b[0]) * (b[3] - b[2]);
      steps.forEach(function (value, i) { if (Math.abs(value - step) < Math.abs(steps[near] - step)) { near = i; } });
      var x = b[0] + (steps[near] - b[2]) / (b[3] - b[2]) * (b[1] - b[0]);
      hair.setAttribute('x1', x);
      hair.setAttribute('x2', x);
      box.textContent = '';
      var head = doc.createElement('b');
      head.textContent = svg.dataset.n + ' ' + steps[near];
      box.appendChild(head);
      lines.forEach(function (line) {
        if (!line.values[near]) { return; }
        var row = doc.createElement('div'), dot = doc.createElement('i');
        dot.style.background = 'var(--' + line.colour + ')';
        row.appendChild(dot);
        row.appendChild(doc.createTextNode(line.name + ': ' + line.values[near]));
        box.appendChild(row);
      });
      box.style.visibility = hair.style.visibility = 'visible';
      var width = box.offsetWidth, left = event.clientX + 14;
      if (left + width > innerWidth - 8) { left = event.clientX - width - 14; }
      box.style.left = Math.max(4, left) + 'px';
      box.style.top = Math.max(4, Math.min(event.clientY + 12, innerHeight - box.offsetHeight - 8)) + 'px';
    });
  });

  var opened = [];
  addEventListener('beforeprint', function () {
    opened = Array.prototype.slice.call(doc.querySelectorAll('details:not([open])'));
    opened.forEach(function (item) { item.open = true; });
  });
  addEventListener('afterprint', function () { opened.forEach(function (item) { item.open = false; }); });
})();
