//! Prometheus' text format, read as far as tests and the live table need it.

use std::collections::BTreeMap;

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the series.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metrics {
    /// In the order of the text.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Reads a scrape; lines that are no samples are skipped.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(sample).collect() }
    }

    /// Samples of one name that carry all of the given labels.
    pub fn select<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        let matches = |sample: &Sample| {
            labels.iter().all(|(key, value)| sample.labels.get(*key).map(String::as_str) == Some(*value))
        };
        self.samples.iter().filter(move |sample| sample.name == name && matches(sample))
    }

    /// Sum of the samples of one name that carry all of the given labels; 0 when there are none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.select(name, labels).map(|sample| sample.value).sum()
    }
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let (name, labels, rest) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, rest) = labels(rest)?;
            (name, labels, rest)
        }
        None => {
            let (name, rest) = line.split_once(' ')?;
            (name, BTreeMap::new(), rest)
        }
    };
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name: name.trim().to_owned(), labels, value })
}

/// Reads `a="b",c="d"} rest`; a value may contain `\"`, `\\` and `\n`.
fn labels(text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    let mut rest = text.trim_start();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, tail) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut letters = tail.char_indices();
        let end = loop {
            match letters.next()? {
                (at, '"') => break at,
                (_, '\\') => match letters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, letter) => value.push(letter),
            }
        };
        labels.insert(name.trim().to_owned(), value);
        rest = tail.get(end + 1..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_labels_and_escapes() {
        let text = "# HELP a b\n# TYPE a counter\na_total{x=\"1,2}\",y=\"q\\\"\"} 3 1700000000\na_total{x=\"2\"} 4.5\nb 1\nbroken{x=\"\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.samples.len(), 3);
        assert_eq!(metrics.sum("a_total", &[]), 7.5);
        assert_eq!(metrics.sum("a_total", &[("y", "q\"")]), 3.0);
        assert_eq!(metrics.sum("b", &[]), 1.0);
        assert_eq!(metrics.sum("c", &[]), 0.0);
    }
}
