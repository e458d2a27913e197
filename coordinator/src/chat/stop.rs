//! Stop strings: text goes out up to the first of them, and what may be the start of one waits.

/// Finds stop strings in a text that arrives in pieces; how it is cut into pieces makes no difference.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    matched: Option<usize>,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Text that is certainly before any stop string.
    pub emit: String,
    /// Which stop string, by its place in the list, has ended the text. Nothing is emitted from then on.
    pub matched: Option<usize>,
}

impl StopMatcher {
    /// Watches for any of `stops`; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes the next piece of text. Of several stop strings the one that is complete first counts, of those that end
    /// at the same place the longest, and of equal ones the first. The stop string itself is not emitted.
    pub fn push(&mut self, text: &str) -> Outcome {
        if self.matched.is_some() {
            return Outcome { emit: String::new(), matched: self.matched };
        }
        self.held.push_str(text);
        if let Some((start, index)) = self.first_match() {
            self.matched = Some(index);
            self.held.truncate(start);
            return Outcome { emit: std::mem::take(&mut self.held), matched: self.matched };
        }
        let waiting = self.held.split_off(start_of_partial_match(&self.held, &self.stops));
        Outcome { emit: std::mem::replace(&mut self.held, waiting), matched: None }
    }

    /// Ends the text: returns what waited in vain.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start of the match in what is held, and which stop string it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        let found = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()).filter_map(|(index, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        found.min().map(|(_, start, index)| (start, index))
    }
}

/// Where the longest tail of `text` begins that one of `patterns` also begins with; the end of the text if there is none.
pub(super) fn start_of_partial_match<P: AsRef<str>>(text: &str, patterns: &[P]) -> usize {
    let longest = patterns.iter().map(|pattern| pattern.as_ref().len()).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    let begins = |tail: &str| patterns.iter().any(|pattern| pattern.as_ref().starts_with(tail));
    (from..text.len()).find(|at| text.get(*at..).is_some_and(begins)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let outcome = matcher.push(piece);
            text.push_str(&outcome.emit);
            if outcome.matched.is_some() {
                return (text + &matcher.finish(), outcome.matched);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn the_stop_string_and_what_follows_are_not_emitted() {
        assert_eq!(feed(&["\n\n"], &["one\n", "\ntwo"]), ("one".to_owned(), Some(0)));
        assert_eq!(feed(&["zzz", "END"], &["a E", "N", "D b"]), ("a ".to_owned(), Some(1)));
    }

    #[test]
    fn a_start_that_comes_to_nothing_is_emitted() {
        assert_eq!(feed(&["END"], &["a EN", "T"]), ("a ENT".to_owned(), None));
        assert_eq!(feed(&["END"], &["a EN"]), ("a EN".to_owned(), None));
        assert_eq!(feed(&["aab"], &["aa", "ab"]), ("a".to_owned(), Some(0)));
    }

    #[test]
    fn text_waits_only_while_it_may_be_a_stop_string() {
        let mut matcher = StopMatcher::new(vec!["<end>".to_owned()]);
        assert_eq!(matcher.push("hello <").emit, "hello ");
        assert_eq!(matcher.push("b> é").emit, "<b> é");
    }

    #[test]
    fn of_two_the_one_complete_first_counts_and_then_the_longest() {
        assert_eq!(feed(&["abc", "b"], &["xabc"]), ("xa".to_owned(), Some(1)));
        assert_eq!(feed(&["b", "ab"], &["xab"]), ("x".to_owned(), Some(1)));
        assert_eq!(feed(&["", "é"], &["caf", "é"]), ("caf".to_owned(), Some(1)));
    }

    proptest! {
        #[test]
        fn cutting_makes_no_difference(
            text in "[abé ]{0,24}",
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let chars: Vec<String> = text.chars().map(String::from).collect();
            let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
            let whole = feed(&stops, &[text.as_str()]);
            prop_assert_eq!(&feed(&stops, &chars), &whole);
            prop_assert!(text.starts_with(whole.0.as_str()));
            prop_assert_eq!(whole.1.is_none(), whole.0 == text);
            for stop in stops.iter().filter(|stop| !stop.is_empty()) {
                prop_assert!(!whole.0.contains(stop));
            }
        }
    }
}
