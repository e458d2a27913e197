//! Which of the known names was probably meant.

/// The known name with the smallest edit distance; None when there are none.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known.into_iter().min_by_key(|known| distance(known, name))
}

/// The nearest known name, where it may have been meant: with no more edits than half of the letters that were written.
pub fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    nearest(name, known).filter(|known| 2 * distance(known, name) <= name.chars().count())
}

/// Edit distance (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(80).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_has_the_fewest_edits() {
        assert_eq!(nearest("batch_sise", ["iters", "batch_size", "test_batches"]), Some("batch_size"));
        assert_eq!(nearest("kitten", ["sitting"]), Some("sitting"));
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(nearest("anything", []), None);
        assert_eq!([near("batch_sise", ["iters", "batch_size"]), near("xyzzyqq", ["config"])], [Some("batch_size"), None]);
    }
}
