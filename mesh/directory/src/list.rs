//! A persistent list: endpoints of a service, workloads of an identity.

use std::sync::Arc;

/// Beyond this many a list is a tree.
const SHORT: usize = 64;

/// Items in an order that removal does not keep. Cloning is cheap and a clone never changes; a change costs no more than [`SHORT`] items or the
/// logarithm of all.
#[derive(Clone, Debug)]
pub(crate) enum List<T> {
    /// Exactly as large as needed, and one step away: most services are small, and there are many.
    Short(Arc<[T]>),
    /// As a copy of the whole would cost too much; boxed to keep the short ones small.
    Long(Box<imbl::Vector<T>>),
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self::Short(Arc::default())
    }
}

impl<T> List<T> {
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Short(items) => items.is_empty(),
            Self::Long(items) => items.is_empty(),
        }
    }
}

impl<T: Clone> List<T> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Short(items) => items.len(),
            Self::Long(items) => items.len(),
        }
    }

    pub(crate) fn get(&self, at: usize) -> Option<&T> {
        match self {
            Self::Short(items) => items.get(at),
            Self::Long(items) => items.get(at),
        }
    }

    pub(crate) fn iter(&self) -> Iter<'_, T> {
        Iter(match self {
            Self::Short(items) => Kind::Short(items.iter()),
            Self::Long(items) => Kind::Long(items.iter()),
        })
    }

    pub(crate) fn push(&mut self, item: T) {
        match self {
            Self::Short(items) if items.len() < SHORT => {
                *items = items.iter().cloned().chain(std::iter::once(item)).collect();
            }
            Self::Short(items) => {
                *self = Self::Long(Box::new(items.iter().cloned().chain(std::iter::once(item)).collect()));
            }
            Self::Long(items) => items.push_back(item),
        }
    }

    /// Takes out the first item that `is` the one; the last takes its place. Whether there was one.
    pub(crate) fn remove(&mut self, is: impl FnMut(&T) -> bool) -> bool {
        let Some(at) = self.iter().position(is) else { return false };
        match self {
            Self::Short(items) => {
                let (before, after) = (items.iter().take(at), items.iter().skip(at + 1));
                *items = before.chain(after).cloned().collect();
            }
            Self::Long(items) => {
                if let Some(last) = items.pop_back()
                    && at < items.len()
                {
                    items.set(at, last);
                }
                if items.len() <= SHORT / 2 {
                    *self = Self::Short(items.iter().cloned().collect());
                }
            }
        }
        true
    }
}

/// The items of a list, in no order.
pub struct Iter<'a, T>(Kind<'a, T>);

enum Kind<'a, T> {
    Short(std::slice::Iter<'a, T>),
    Long(imbl::vector::Iter<'a, T, imbl::shared_ptr::DefaultSharedPtr>),
}

impl<'a, T: Clone> Iterator for Iter<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        match &mut self.0 {
            Kind::Short(items) => items.next(),
            Kind::Long(items) => items.next(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        match &self.0 {
            Kind::Short(items) => items.size_hint(),
            Kind::Long(items) => items.size_hint(),
        }
    }
}

impl<T: Clone> ExactSizeIterator for Iter<'_, T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_holds_what_was_put_in_and_not_taken_out() {
        let mut list = List::default();
        let mut model: Vec<usize> = Vec::new();
        for number in 0..5 * SHORT {
            let before = list.clone();
            list.push(number);
            model.push(number);
            assert_eq!((before.len(), list.len()), (number, number + 1));
        }
        assert!(matches!(list, List::Long(_)));
        while let Some(number) = model.pop() {
            assert!(list.remove(|item| *item == number) && !list.remove(|item| *item == number));
            let mut left: Vec<usize> = list.iter().copied().collect();
            left.sort_unstable();
            assert_eq!(left, model);
            assert!((0..list.len()).all(|at| list.get(at) == list.iter().nth(at)));
        }
        assert!(list.is_empty() && matches!(list, List::Short(_)));
    }
}
