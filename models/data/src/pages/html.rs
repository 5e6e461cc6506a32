//! HTML → visible text and pictures in the order of the document.
//!
//! What is not read: elements that show no text of the page or that lead elsewhere (`SKIPPED`), hidden
//! ones (`hidden`, `aria-hidden`, `display:none`, `visibility:hidden`), landmarks around the content
//! (`ROLES`; `<header>` outside of an article), and elements with a word of `BOILERPLATE` in their class
//! or id.

use ego_tree::iter::Edge;
use scraper::node::Element;
use scraper::{Html, Node};

/// A stretch of a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Visible text, white space normalised: single spaces, a line feed between blocks.
    Text(String),
    /// A picture: the addresses where it may lie, as written, best first.
    Picture(Vec<String>),
}

/// What is read of a page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// `<base href>`, as written.
    pub base: Option<String>,
    /// Text and pictures in the order of the document.
    pub pieces: Vec<Piece>,
}

impl Content {
    /// All text, a line feed where a picture was.
    pub fn text(&self) -> String {
        let texts = self.pieces.iter().filter_map(|piece| match piece {
            Piece::Text(text) => Some(text.as_str()),
            Piece::Picture(_) => None,
        });
        texts.collect::<Vec<_>>().join("\n")
    }
}

/// Most tags of a page: the time of the parser can grow with the square of their nesting. The limit on bytes
/// does the same for the attributes of one tag.
const MAX_TAGS: usize = 30_000;

/// Most addresses of one picture that are tried.
const MAX_ADDRESSES: usize = 32;

const SKIPPED: [&str; 31] = [
    "head", "script", "style", "template", "title", "nav", "footer", "aside", "menu", "dialog",
    "button", "select", "option", "datalist", "textarea", "input", "label", "iframe", "frameset",
    "object", "embed", "applet", "video", "audio", "canvas", "svg", "math", "noembed", "noframes",
    "map", "rp",
];

const ROLES: [&str; 9] = [
    "navigation",
    "banner",
    "contentinfo",
    "complementary",
    "search",
    "menu",
    "menubar",
    "dialog",
    "alert",
];

/// Words of `class` and `id` that mark what is not the content.
const BOILERPLATE: [&str; 22] = [
    "nav",
    "navbar",
    "navigation",
    "menu",
    "breadcrumb",
    "breadcrumbs",
    "sidebar",
    "footer",
    "cookie",
    "cookies",
    "consent",
    "advert",
    "advertisement",
    "ads",
    "sponsored",
    "share",
    "social",
    "newsletter",
    "related",
    "comments",
    "popup",
    "modal",
];

/// Elements that are the page or its content, whatever their class says.
const CONTENT: [&str; 4] = ["html", "body", "main", "article"];

/// Elements within a line of text; all others begin and end one.
const INLINE: [&str; 61] = [
    "a", "abbr", "acronym", "audio", "b", "bdi", "bdo", "big", "button", "canvas", "cite", "code",
    "data", "datalist", "del", "dfn", "em", "embed", "font", "i", "iframe", "img", "input", "ins",
    "kbd", "label", "map", "mark", "math", "meter", "nobr", "noscript", "object", "output",
    "picture", "progress", "q", "rp", "rt", "ruby", "s", "samp", "script", "select", "small",
    "source", "span", "strike", "strong", "style", "sub", "sup", "svg", "template", "textarea",
    "time", "tt", "u", "var", "video", "wbr",
];

const LAZY: [&str; 5] =
    ["data-src", "data-original", "data-lazy-src", "data-lazy", "data-orig-file"];
const LAZY_SETS: [&str; 2] = ["data-srcset", "data-lazy-srcset"];

/// Reads a page, broken tags as browsers do. `None` if it has too many tags.
pub fn read(html: &str) -> Option<Content> {
    if html.bytes().filter(|&byte| byte == b'<').count() > MAX_TAGS {
        return None;
    }
    let document = Html::parse_document(html);
    let base = document.tree.root().descendants().find_map(|node| {
        let element = node.value().as_element()?;
        (element.name() == "base").then(|| element.attr("href").map(str::to_owned))?
    });
    let mut walker = Walker::default();
    for edge in document.tree.root().traverse() {
        match edge {
            Edge::Open(node) => walker.open(node),
            Edge::Close(node) => walker.close(node.value()),
        }
    }
    Some(Content { base, pieces: walker.flow.finish() })
}

#[derive(Default)]
struct Walker {
    flow: Flow,
    /// Open elements from the outermost that is not read.
    n_hidden: usize,
    /// Open articles, sections and mains.
    n_articles: usize,
}

impl Walker {
    fn open(&mut self, node: ego_tree::NodeRef<'_, Node>) {
        match node.value() {
            Node::Text(text) if self.n_hidden == 0 => self.flow.text(text),
            Node::Element(element) => self.open_element(element, node),
            Node::Text(_) | Node::Document | Node::Fragment | Node::Doctype(_) => {}
            Node::Comment(_) | Node::ProcessingInstruction(_) => {}
        }
    }

    fn open_element(&mut self, element: &Element, node: ego_tree::NodeRef<'_, Node>) {
        self.flow.boundary(element.name());
        if self.n_hidden > 0 || self.is_hidden(element) {
            self.n_hidden += 1;
            return;
        }
        self.n_articles += usize::from(is_article(element));
        match element.name() {
            "img" => self.flow.picture(addresses(element, node)),
            // With scripts, as the parser assumes, what is inside is text: pictures for those without.
            "noscript" => {
                self.n_hidden += 1;
                let inside = node.children().filter_map(|child| Some(&**child.value().as_text()?));
                self.flow.fallback(&inside.collect::<String>());
            }
            _ => {}
        }
    }

    fn close(&mut self, node: &Node) {
        let Some(element) = node.as_element() else { return };
        self.flow.boundary(element.name());
        match self.n_hidden {
            0 => self.n_articles -= usize::from(is_article(element)),
            _ => self.n_hidden -= 1,
        }
    }

    fn is_hidden(&self, element: &Element) -> bool {
        let name = element.name();
        SKIPPED.contains(&name)
            || name == "header" && self.n_articles == 0
            || element.attr("hidden").is_some()
            || element.attr("aria-hidden").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || element
                .attr("role")
                .is_some_and(|role| ROLES.contains(&role.to_lowercase().as_str()))
            || element.attr("style").is_some_and(hides)
            || !CONTENT.contains(&name) && is_boilerplate(element)
    }
}

fn is_article(element: &Element) -> bool {
    ["article", "section", "main"].contains(&element.name())
}

fn hides(style: &str) -> bool {
    let compact: String = style.chars().filter(|c| !c.is_whitespace()).collect();
    let compact = compact.to_ascii_lowercase();
    compact.contains("display:none") || compact.contains("visibility:hidden")
}

fn is_boilerplate(element: &Element) -> bool {
    let names = [element.attr("class"), element.attr("id")].into_iter().flatten();
    let mut words = names.flat_map(|name| name.split(|c: char| !c.is_ascii_alphanumeric()));
    words.any(|word| BOILERPLATE.iter().any(|boilerplate| word.eq_ignore_ascii_case(boilerplate)))
}

/// Where the picture of an `<img>` may lie: what a script would load, the largest of a set, the plain
/// address, then other forms in the same `<picture>`.
fn addresses(element: &Element, node: ego_tree::NodeRef<'_, Node>) -> Vec<String> {
    let attributes = |names: &[&str]| -> Vec<&str> {
        names
            .iter()
            .filter_map(|name| element.attr(name))
            .filter(|value| !value.is_empty())
            .collect()
    };
    let mut found: Vec<&str> = attributes(&LAZY);
    found.extend(attributes(&LAZY_SETS).into_iter().flat_map(source_set));
    let is_lazy = !found.is_empty();
    found.extend(attributes(&["srcset"]).into_iter().flat_map(source_set));
    // Until a script runs, `src` is often a stand-in.
    found.extend(
        attributes(&["src"]).into_iter().filter(|src| !(is_lazy && src.starts_with("data:"))),
    );
    for source in sources(node) {
        let sets = ["srcset", "data-srcset"].into_iter().filter_map(|name| source.attr(name));
        found.extend(sets.flat_map(source_set));
    }
    let mut addresses: Vec<String> = Vec::new();
    let found = found.into_iter().map(str::trim).filter(|address| !address.is_empty());
    for address in found.take(MAX_ADDRESSES) {
        if !addresses.iter().any(|known| known == address) {
            addresses.push(address.to_owned());
        }
    }
    addresses
}

/// The `<source>` elements beside an `<img>` in a `<picture>`.
fn sources<'a>(node: ego_tree::NodeRef<'a, Node>) -> Vec<&'a Element> {
    let parent = node.parent().filter(|parent| {
        parent.value().as_element().is_some_and(|element| element.name() == "picture")
    });
    let siblings = parent.into_iter().flat_map(|parent| parent.children()).take(MAX_ADDRESSES);
    let elements = siblings.filter_map(|node| node.value().as_element());
    elements.filter(|element| element.name() == "source").collect()
}

/// Addresses of a `srcset`, largest first.
/// <https://html.spec.whatwg.org/multipage/images.html#parse-a-srcset-attribute>
fn source_set(value: &str) -> Vec<&str> {
    let mut found: Vec<(f64, &str)> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == ',');
        if rest.is_empty() {
            break;
        }
        let (address, after) = rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len()));
        if let Some(address) = address.strip_suffix(',') {
            found.push((1.0, address.trim_end_matches(',')));
            rest = after;
            continue;
        }
        let (descriptor, after) = after.split_at(after.find(',').unwrap_or(after.len()));
        let number = descriptor.trim().trim_end_matches(['w', 'x', 'h']);
        found.push((number.parse().unwrap_or(1.0), address));
        rest = after;
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.into_iter().map(|(_, address)| address).collect()
}

/// White space that is due before the next letter.
#[derive(Clone, Copy, Default, PartialEq, PartialOrd)]
enum Gap {
    #[default]
    None,
    Space,
    Line,
}

/// Pieces as they grow.
#[derive(Default)]
struct Flow {
    pieces: Vec<Piece>,
    text: String,
    gap: Gap,
}

impl Flow {
    fn text(&mut self, text: &str) {
        for c in text.chars() {
            if c.is_whitespace() {
                self.widen(Gap::Space);
            } else if !is_invisible(c) {
                match self.gap {
                    Gap::None => {}
                    Gap::Space => self.text.push(' '),
                    Gap::Line => self.text.push('\n'),
                }
                self.gap = Gap::None;
                self.text.push(c);
            }
        }
    }

    fn widen(&mut self, gap: Gap) {
        if !self.text.is_empty() && self.gap < gap {
            self.gap = gap;
        }
    }

    /// An element begins or ends. Cells of a row stay on one line.
    fn boundary(&mut self, name: &str) {
        match name {
            "td" | "th" => self.widen(Gap::Space),
            name if INLINE.contains(&name) => {}
            _ => self.widen(Gap::Line),
        }
    }

    fn picture(&mut self, addresses: Vec<String>) {
        if addresses.is_empty() {
            return;
        }
        self.end_text();
        self.pieces.push(Piece::Picture(addresses));
    }

    /// Pictures of a `<noscript>`: the one before, for browsers without scripts, or its stand-in's real form.
    fn fallback(&mut self, html: &str) {
        let inside = Html::parse_fragment(html);
        for node in inside.tree.root().descendants() {
            let Some(element) = node.value().as_element().filter(|e| e.name() == "img") else {
                continue;
            };
            let addresses = addresses(element, node);
            let last = match (self.text.is_empty(), self.pieces.last_mut()) {
                (true, Some(Piece::Picture(last))) => last,
                _ => {
                    self.picture(addresses);
                    continue;
                }
            };
            if last.iter().all(|address| address.starts_with("data:")) {
                last.splice(0..0, addresses);
                last.truncate(MAX_ADDRESSES);
            } else if !addresses.iter().any(|address| last.contains(address)) {
                self.picture(addresses);
            }
        }
    }

    fn end_text(&mut self) {
        self.gap = Gap::None;
        if !self.text.is_empty() {
            self.pieces.push(Piece::Text(std::mem::take(&mut self.text)));
        }
    }

    fn finish(mut self) -> Vec<Piece> {
        self.end_text();
        self.pieces
    }
}

/// Characters that take no place: controls, soft hyphen, zero-width spaces and marks of order.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::{MAX_TAGS, Piece, read, source_set};

    /// Text as it is, pictures as `[address address]`.
    fn check(html: &str, expected: &str) {
        let pieces = read(html).unwrap().pieces;
        let found = pieces.iter().map(|piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Picture(addresses) => format!("[{}]", addresses.join(" ")),
        });
        assert_eq!(found.collect::<String>(), expected, "{html}");
    }

    #[test]
    fn white_space_is_what_a_reader_sees() {
        check(" a \n b<b> c</b>d ", "a b cd");
        check("<p>a</p><p>b<br>c<div><div>d</div></div>", "a\nb\nc\nd");
        check("<ul><li>a<li>b</ul>c", "a\nb\nc");
        check("<table><tr><td>a</td><td>b<tr><th>c</table>", "a b\nc");
        check(
            "so<wbr>me<script>x</script>thing<!-- c -->s and&nbsp;co&shy;ats\u{200b}",
            "somethings and coats",
        );
        check("a<nav>n</nav>b<span hidden>h</span>c", "a\nbc");
        check("", "");
    }

    #[test]
    fn what_is_hidden_or_around_the_content_is_not_read() {
        check("<header>x</header><article><header>a</header><p>b</article>", "a\nb");
        check("<div class='post nav-links'>x</div><main class=menu>a</main>", "a");
        check("<div class=navigate id=sharing>a</div>", "a");
        check("<p style='visibility : hidden'>x<b>y</b></p>a<p aria-hidden=TRUE>x", "a");
        check("<div role=Navigation><div><img src=x></div></div><aside>x</aside>a", "a");
        check("<div hidden><article></div></article>a<header>x</header>", "a");
    }

    #[test]
    fn addresses_of_a_picture_best_first() {
        check("a<img src=x alt=y>b", "a[x]b");
        check("<img src=x srcset='y 100w, z 300w'>", "[z y x]");
        check("<img src=data:stand-in data-src=x>", "[x]");
        check("<img src=small data-original=x data-srcset='y 2x'>", "[x y small]");
        check("<picture><source srcset='w 1x'><img src=x></picture>", "[x w]");
        check("<img><img src=''><img src=' '>", "");
    }

    #[test]
    fn noscript_repeats_the_picture_before_it() {
        check("<img data-src=x><noscript><img src=x>words</noscript>", "[x]");
        check("<img src=data:stand-in><noscript><img src=x></noscript>", "[x data:stand-in]");
        check("<img src=x>a<noscript><img src=x></noscript>", "[x]a[x]");
        check("<body><noscript><img src=x><img src=y></noscript>a", "[x][y]a");
    }

    #[test]
    fn sets_of_sources() {
        assert_eq!(source_set("a, b 2x ,c 1.5x"), ["b", "c", "a"]);
        assert_eq!(
            source_set(" a,b 3w,, data:image/png;base64,AA== 9w,"),
            ["data:image/png;base64,AA==", "a,b"]
        );
        assert_eq!(source_set("a NaNx, b -1w"), ["a", "b"]);
        assert_eq!(source_set(" ,"), [""; 0]);
    }

    #[test]
    fn too_many_tags_are_refused_and_many_are_not() {
        assert!(read(&"<p>".repeat(MAX_TAGS)).is_some());
        assert!(read(&"<p>".repeat(MAX_TAGS + 1)).is_none());
    }
}
