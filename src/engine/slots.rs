//! Slots of a draft server. Each drafted completion leases one, so that its prompt stays in that slot's cache.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::speculation::Token;

/// The slots of one draft server.
#[derive(Debug, Clone, Default)]
pub struct DraftSlots(Arc<Mutex<Vec<DraftSlot>>>);

#[derive(Debug, Default)]
struct DraftSlot {
    leased: bool,
    /// The committed tokens of the last completion that used it.
    cached: Vec<Token>,
}

/// Lease of a slot; dropping it returns the slot.
#[derive(Debug)]
pub struct SlotLease {
    slots: DraftSlots,
    index: usize,
}

impl DraftSlots {
    /// Sets the number of slots; the ones beyond it are removed.
    pub fn resize(&self, total: usize) {
        self.0.lock().resize_with(total, DraftSlot::default);
    }

    /// Leases the free slot whose cache shares the longest prefix with `tokens`; `None` when all are leased.
    #[must_use]
    pub fn lease(&self, tokens: &[Token]) -> Option<SlotLease> {
        let mut slots = self.0.lock();
        let (index, slot) = slots
            .iter_mut()
            .enumerate()
            .filter(|(_, slot)| !slot.leased)
            .max_by_key(|(_, slot)| slot.cached.iter().zip(tokens).take_while(|(a, b)| a == b).count())?;
        slot.leased = true;
        slot.cached = tokens.to_vec();
        Some(SlotLease {
            slots: self.clone(),
            index,
        })
    }
}

impl SlotLease {
    /// The slot's number at the server.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        if let Some(slot) = self.slots.0.lock().get_mut(self.index) {
            slot.leased = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_goes_to_one_completion_at_a_time_and_to_the_one_it_has_cached() {
        let slots = DraftSlots::default();
        slots.resize(2);
        let first = slots.lease(&[1, 2, 3]).unwrap();
        let second = slots.lease(&[7, 8]).unwrap();
        assert_ne!(first.index(), second.index());
        assert!(slots.lease(&[1]).is_none());
        let index = first.index();
        drop((first, second));
        assert_eq!(slots.lease(&[1, 2, 4]).unwrap().index(), index);
    }
}
