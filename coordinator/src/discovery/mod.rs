//! Finding workers, and other coordinators of the same cluster, on the local network.

pub mod interfaces;
pub mod mdns;
pub mod rivals;

use mlx_cluster_common::ids::NodeId;

/// Peers that are remembered at most; a network has no business with more, and an attacker gets no more.
pub const PEERS_MAX: usize = 256;
const NAME_CHARS_MAX: usize = 80;
const LINE_CHARS_MAX: usize = 500;

/// A worker as it announced itself: a hint, to be checked by connecting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub node: NodeId,
    pub name: String,
    /// `host:port`, best first.
    pub addresses: Vec<String>,
}

/// A name from outside, made fit for a terminal.
pub fn printable(name: &str) -> String {
    cut(name, NAME_CHARS_MAX)
}

/// A sentence from outside, made fit for a terminal.
pub fn printable_line(text: &str) -> String {
    cut(text, LINE_CHARS_MAX)
}

fn cut(text: &str, chars_max: usize) -> String {
    let mut printable: String = text.chars().take(chars_max).flat_map(escape).collect();
    if text.chars().nth(chars_max).is_some() {
        printable.push('…');
    }
    printable
}

fn escape(c: char) -> Vec<char> {
    // Direction marks and the like are invisible, and make one name look like another.
    let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
    if c.is_control() || hidden { c.escape_unicode().collect() } else { vec![c] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_names_cut() {
        assert_eq!(printable("mini\u{1b}[31m"), "mini\\u{1b}[31m");
        assert_eq!(printable("Anna's Mäc"), "Anna's Mäc");
        assert_eq!(printable(&"x".repeat(200)).chars().count(), NAME_CHARS_MAX + 1);
    }
}
