//! Texts that many resources share (namespaces, networks, nodes, hosts), kept once.

use std::collections::HashSet;
use std::sync::Arc;

/// Below this many texts, unused ones are not looked for.
const SMALLEST_SWEEP: usize = 1024;

/// Shared texts. Owned by the writer; forgets what nobody uses once it has doubled.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Interner {
    /// The one copy of `text`.
    pub(crate) fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.sweep_at.max(SMALLEST_SWEEP) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = self.texts.len() * 2;
        }
        let text: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&text));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_copy_and_unused_ones_are_forgotten() {
        let mut interner = Interner::default();
        let kept = interner.intern("kept");
        for number in 0..10 * SMALLEST_SWEEP {
            interner.intern(&number.to_string());
        }
        assert!(Arc::ptr_eq(&kept, &interner.intern("kept")));
        assert!(interner.texts.len() <= 2 * SMALLEST_SWEEP, "{} texts", interner.texts.len());
    }
}
