//! The least recently used entries leave first: a map with a budget of bytes, and pins.

use std::collections::BTreeMap;

/// Values with their bytes.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    budget: usize,
    bytes: usize,
    /// Rises with each use.
    clock: u64,
    n_evicted: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: usize,
    last_use: u64,
    n_pins: usize,
}

impl<K: Ord + Copy, V: Clone> Lru<K, V> {
    /// An empty map of at most `budget` bytes.
    pub(crate) fn new(budget: usize) -> Lru<K, V> {
        Lru { entries: BTreeMap::new(), budget, bytes: 0, clock: 0, n_evicted: 0 }
    }

    /// A value, which is then the last used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.clock;
        Some(entry.value.clone())
    }

    /// Puts a value in as the last used, with one pin more if `is_pinned`. What is over the budget
    /// leaves, the least recently used first, but for what is pinned.
    pub(crate) fn insert(&mut self, key: K, value: V, bytes: usize, is_pinned: bool) {
        self.clock += 1;
        let old = self.entries.remove(&key);
        let n_pins = old.as_ref().map_or(0, |old| old.n_pins) + usize::from(is_pinned);
        self.bytes -= old.map_or(0, |old| old.bytes);
        if n_pins == 0 && bytes > self.budget {
            return;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.entries.insert(key, Entry { value, bytes, last_use: self.clock, n_pins });
        self.shrink();
    }

    /// Takes one pin off a value.
    pub(crate) fn unpin(&mut self, key: &K) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.n_pins = entry.n_pins.saturating_sub(1);
        }
        self.shrink();
    }

    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of all values.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Values that had to leave.
    pub(crate) fn n_evicted(&self) -> u64 {
        self.n_evicted
    }

    fn shrink(&mut self) {
        while self.bytes > self.budget {
            let free = self.entries.iter().filter(|(_, entry)| entry.n_pins == 0);
            let Some((key, _)) = free.min_by_key(|(_, entry)| entry.last_use) else { return };
            let key = *key;
            self.bytes -= self.entries.remove(&key).map_or(0, |entry| entry.bytes);
            self.n_evicted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUDGET: usize = 20;

    #[derive(Clone, Copy, Debug)]
    enum Action {
        Get(u8),
        Insert(u8, usize),
        Pin(u8, usize),
        Unpin(u8),
    }

    fn actions() -> impl Strategy<Value = Vec<Action>> {
        let (key, bytes) = (0u8..8, 0usize..25);
        let action = prop_oneof![
            key.clone().prop_map(Action::Get),
            (key.clone(), bytes.clone()).prop_map(|(key, bytes)| Action::Insert(key, bytes)),
            (key.clone(), bytes).prop_map(|(key, bytes)| Action::Pin(key, bytes)),
            key.prop_map(Action::Unpin),
        ];
        proptest::collection::vec(action, 0..60)
    }

    /// (key, value, bytes, pins), the last used at the end.
    #[derive(Default)]
    struct Plain(Vec<(u8, usize, usize, usize)>);

    impl Plain {
        fn take(&mut self, key: u8) -> Option<(u8, usize, usize, usize)> {
            let place = self.0.iter().position(|entry| entry.0 == key)?;
            Some(self.0.remove(place))
        }

        fn insert(&mut self, key: u8, value: usize, bytes: usize, more_pins: usize) {
            let pins = self.take(key).map_or(0, |old| old.3) + more_pins;
            if pins > 0 || bytes <= BUDGET {
                self.0.push((key, value, bytes, pins));
            }
            self.shrink();
        }

        fn shrink(&mut self) {
            while self.0.iter().map(|entry| entry.2).sum::<usize>() > BUDGET {
                let Some(oldest) = self.0.iter().position(|entry| entry.3 == 0) else { return };
                self.0.remove(oldest);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn it_is_a_list_in_order_of_use(actions in actions()) {
            let (mut lru, mut plain) = (Lru::new(BUDGET), Plain::default());
            for (value, action) in actions.into_iter().enumerate() {
                match action {
                    Action::Get(key) => {
                        let expected = plain.take(key);
                        plain.0.extend(expected);
                        prop_assert_eq!(lru.get(&key), expected.map(|entry| entry.1));
                    }
                    Action::Insert(key, bytes) => {
                        lru.insert(key, value, bytes, false);
                        plain.insert(key, value, bytes, 0);
                    }
                    Action::Pin(key, bytes) => {
                        lru.insert(key, value, bytes, true);
                        plain.insert(key, value, bytes, 1);
                    }
                    Action::Unpin(key) => {
                        lru.unpin(&key);
                        if let Some(entry) = plain.0.iter_mut().find(|entry| entry.0 == key) {
                            entry.3 = entry.3.saturating_sub(1);
                        }
                        plain.shrink();
                    }
                }
                let found: BTreeMap<u8, usize> =
                    lru.entries.iter().map(|(key, entry)| (*key, entry.value)).collect();
                let expected: BTreeMap<u8, usize> =
                    plain.0.iter().map(|entry| (entry.0, entry.1)).collect();
                prop_assert_eq!(found, expected);
                prop_assert_eq!(lru.bytes(), plain.0.iter().map(|entry| entry.2).sum::<usize>());
            }
        }
    }
}
