//! Measured tables in Markdown files, each between a line `<!-- NAME -->` and a line `<!-- end -->`.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Puts a table between its two marks in a file of the repository.
pub(crate) fn insert(root: &Path, file: &str, name: &str, table: &str) -> Result<()> {
    let path = root.join(file);
    let mut text = fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
    let (begin, end) = (format!("<!-- {name} -->\n"), "<!-- end -->");
    let from = text.find(&begin).with_context(|| format!("no `{}` in {file}", begin.trim()))?
        + begin.len();
    let to =
        from + text[from..].find(end).with_context(|| format!("no `{end}` after it in {file}"))?;
    text.replace_range(from..to, &format!("\n{table}\n"));
    fs::write(&path, text).with_context(|| format!("cannot write {file}"))
}
