//! A look at a template's tags before it is compiled: `{% generation %}` is replaced, and tags of absurd length are refused.

use super::TemplateError;

/// The compiler recurses over the operators of one tag, so the length of a tag bounds the depth of its stack.
const MAX_TAG_BYTES: usize = 16 << 10;

/// `source` with `{% generation %}` .. `{% endgeneration %}`, which mark for training what the assistant says and which
/// minijinja does not know, as an `if` that is always true. The dashes of the tags stay.
///
/// # Errors
/// [`TemplateError::Budget`] for a tag that is too long.
pub(super) fn without_generation_tags(source: &str) -> Result<String, TemplateError> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|at| at + 2),
            Some(b'%') => tag_end(tag, "%}"),
            Some(b'{') => tag_end(tag, "}}"),
            _ => Some(1),
        };
        // A tag without an end is for the compiler to report.
        let (tag, after) = tag.split_at(end.unwrap_or(tag.len()));
        if tag.len() > MAX_TAG_BYTES && !tag.starts_with("{#") {
            return Err(TemplateError::Budget { limit: "a tag of more than 16 KiB" });
        }
        out.push_str(&replaced(tag));
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the tag ends; its closing mark may also occur inside a string.
fn tag_end(tag: &str, close: &str) -> Option<usize> {
    let mut quote = None;
    let mut chars = tag.char_indices().skip(2);
    while let Some((at, char)) = chars.next() {
        match quote {
            Some(_) if char == '\\' => {
                chars.next();
            }
            Some(mark) if char == mark => quote = None,
            Some(_) => {}
            None if matches!(char, '"' | '\'') => quote = Some(char),
            None if tag.get(at..).is_some_and(|rest| rest.starts_with(close)) => return Some(at + close.len()),
            None => {}
        }
    }
    None
}

fn replaced(tag: &str) -> std::borrow::Cow<'_, str> {
    let Some(inside) = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")) else { return tag.into() };
    let word = inside.trim_matches(['-', '+']).trim();
    let statement = match word {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return tag.into(),
    };
    tag.replacen(word, statement, 1).into()
}
