// What axe-core finds serious in the pages' theme: wide tables and code that the keyboard cannot scroll, and a search
// without a name. The theme wraps tables when the page has loaded; `document$` is its word for that.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  setTimeout(() => {
    for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) wide.tabIndex = 0;
  });
});
