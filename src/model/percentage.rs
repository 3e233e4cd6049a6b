//! Percentage prices that charge by event: a fixed amount, least and greatest fees,
//! free events and a free amount, in the order of time.
//!
//! As [Lago](https://docs.getlago.com/guide/plans/charges/charge-models/percentage)
//! has it: where both a number of events and an amount are free, an event is free as
//! far as both allow.

use super::decimal::{Decimal, DecimalError, DecimalSum};
use super::timestamp::Timestamp;

/// A percentage price.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Percentage {
    pub rate_percent: Decimal,
    /// Charged for each event that is not free as a whole.
    pub fixed_amount_per_event: Decimal,
    pub free_events: Option<u64>,
    pub free_amount: Option<Decimal>,
    pub minimum_amount_per_event: Option<Decimal>,
    pub maximum_amount_per_event: Option<Decimal>,
}

impl Percentage {
    /// Whether the quantity and the number of events do not tell the price.
    pub fn needs_transactions(&self) -> bool {
        let is_free_by_amount = self.free_amount.is_some() && !self.fixed_amount_per_event.is_zero();
        self.is_clamped() || is_free_by_amount || self.free_events.is_some()
    }

    /// How many of the first events of an accumulation must be known one by one.
    fn listed(&self) -> usize {
        match (self.free_events, self.free_amount) {
            (Some(events), _) => usize::try_from(events).unwrap_or(usize::MAX),
            (None, Some(_)) => usize::MAX,
            (None, None) => 0,
        }
    }

    /// The cost of a quantity from so many events, where no transactions are needed.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn cost(&self, quantity: Decimal, events: u64) -> Result<Decimal, DecimalError> {
        let charged = self.beyond_free(quantity)?;
        self.rate_of(charged)?.checked_add(self.fixed_of(events)?)
    }

    /// The cost of an accumulation by its events.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn cost_of(&self, transactions: &Transactions) -> Result<Decimal, DecimalError> {
        let charged = self.charged(transactions, &mut |_, _| ())?;
        if self.is_clamped() {
            return charged.fees.total();
        }
        self.rate_of(charged.value.total()?)?.checked_add(self.fixed_of(charged.events)?)
    }

    /// Whether the fee of each event is held between bounds.
    pub fn is_clamped(&self) -> bool {
        self.minimum_amount_per_event.is_some() || self.maximum_amount_per_event.is_some()
    }

    /// What of the events is charged. `each` hears of those that are known one by one, in
    /// the order of time.
    pub(super) fn charged(
        &self,
        transactions: &Transactions,
        each: &mut dyn FnMut(&Transaction, EventCharge),
    ) -> Result<Charges, DecimalError> {
        let mut charges = transactions.rest;
        let mut running = DecimalSum::default();
        let mut first: Vec<_> = transactions.first.iter().collect();
        first.sort_unstable();
        for (at, transaction) in (0u64..).zip(first) {
            let before = self.beyond_free(running.total()?)?;
            running.add(transaction.value);
            let after = running.total()?;
            let has_allowance = self.free_events.is_none_or(|events| at < events);
            let is_free = has_allowance && self.free_amount.is_none_or(|free| after <= free);
            let charged = match (has_allowance, self.free_amount) {
                (false, _) => transaction.value,
                (true, None) => Decimal::ZERO,
                (true, Some(_)) => self.beyond_free(after)?.checked_sub(before)?,
            };
            let fee = if is_free { self.rate_of(charged)? } else { self.fee(charged)? };
            each(transaction, EventCharge { charged, fee });
            charges.value.add(charged);
            charges.fees.add(fee);
            charges.events += u64::from(!is_free);
        }
        Ok(charges)
    }

    /// What an event is charged that no allowance frees.
    ///
    /// # Errors
    /// [`DecimalError::Overflow`].
    pub fn whole_charge(&self, value: Decimal) -> Result<EventCharge, DecimalError> {
        Ok(EventCharge { charged: value, fee: self.fee(value)? })
    }

    pub(super) fn fixed_of(&self, events: u64) -> Result<Decimal, DecimalError> {
        self.fixed_amount_per_event.checked_mul(Decimal::from_u64(events))
    }

    /// What of a running total the free amount does not hold.
    pub(super) fn beyond_free(&self, total: Decimal) -> Result<Decimal, DecimalError> {
        match self.free_amount {
            Some(free) if !total.is_negative() => Ok(total.checked_sub(free)?.max(Decimal::ZERO)),
            _ => Ok(total),
        }
    }

    pub(super) fn rate_of(&self, amount: Decimal) -> Result<Decimal, DecimalError> {
        amount.mul_div(self.rate_percent, Decimal::from_u64(100))
    }

    /// What one event costs, of which `charged` is not free.
    fn fee(&self, charged: Decimal) -> Result<Decimal, DecimalError> {
        let fee = self.rate_of(charged)?.checked_add(self.fixed_amount_per_event)?;
        let fee = self.minimum_amount_per_event.map_or(fee, |least| fee.max(least));
        Ok(self.maximum_amount_per_event.map_or(fee, |most| fee.min(most)))
    }
}

/// One event, in the order in which allowances are used up.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transaction {
    pub timestamp: Timestamp,
    pub ingested_at: Timestamp,
    pub id: Box<str>,
    pub value: Decimal,
}

/// The events of an accumulation, as far as a price must know them one by one: the
/// first ones as they are, the rest as sums. Whatever the order of adding and merging.
#[derive(Debug, Clone, Default)]
pub struct Transactions {
    first: std::collections::BinaryHeap<Transaction>,
    rest: Charges,
}

/// What one event is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventCharge {
    /// What of its value is not free.
    pub charged: Decimal,
    pub fee: Decimal,
}

/// Sums over events that are charged.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Charges {
    pub value: DecimalSum,
    /// Those that are not free as a whole.
    pub events: u64,
    pub fees: DecimalSum,
}

impl Charges {
    fn add(&mut self, charged: Decimal, price: &Percentage) -> Result<(), DecimalError> {
        self.value.add(charged);
        self.events += 1;
        self.fees.add(price.fee(charged)?);
        Ok(())
    }
}

impl Transactions {
    /// Number and value of all events.
    pub(super) fn whole(&self) -> (u64, DecimalSum) {
        let mut value = self.rest.value;
        self.first.iter().for_each(|transaction| value.add(transaction.value));
        (self.rest.events + self.first.len() as u64, value)
    }

    /// # Errors
    /// [`DecimalError::Overflow`] where the event's own fee overflows.
    pub fn add(&mut self, transaction: Transaction, price: &Percentage) -> Result<(), DecimalError> {
        let listed = price.listed();
        if listed == 0 {
            return self.rest.add(transaction.value, price);
        }
        self.first.push(transaction);
        if self.first.len() > listed
            && let Some(later) = self.first.pop()
        {
            self.rest.add(later.value, price)?;
        }
        Ok(())
    }

    /// # Errors
    /// As [`Transactions::add`].
    pub fn merge(&mut self, other: &Transactions, price: &Percentage) -> Result<(), DecimalError> {
        self.rest.value.merge(other.rest.value);
        self.rest.events += other.rest.events;
        self.rest.fees.merge(other.rest.fees);
        other.first.iter().try_for_each(|transaction| self.add(transaction.clone(), price))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn d(text: &str) -> Decimal {
        text.parse().unwrap()
    }

    fn lago() -> Percentage {
        Percentage {
            rate_percent: d("1.2"),
            fixed_amount_per_event: d("0.10"),
            free_events: Some(3),
            free_amount: Some(d("500")),
            minimum_amount_per_event: None,
            maximum_amount_per_event: None,
        }
    }

    fn cost(price: &Percentage, values: &[i64]) -> String {
        let mut transactions = Transactions::default();
        for (at, value) in (0..).zip(values) {
            transactions.add(transaction(at, *value), price).unwrap();
        }
        price.cost_of(&transactions).unwrap().to_string()
    }

    fn transaction(at: i64, value: i64) -> Transaction {
        let timestamp = Timestamp::from_nanos(at);
        Transaction { timestamp, ingested_at: timestamp, id: "".into(), value: d(&value.to_string()) }
    }

    #[test]
    fn events_and_amounts_are_free_as_far_as_both_allow() {
        // The example of Lago's documentation.
        assert_eq!(cost(&lago(), &[200, 100, 100, 50]), "0.7");
        // The amount is used up first: 100 of the third event are charged.
        assert_eq!(cost(&lago(), &[200, 200, 200]), "1.3");
        assert_eq!(cost(&Percentage { free_events: None, ..lago() }, &[200, 200, 200, 10]), "1.52");
        // A credit takes back what was charged, down to the free amount.
        assert_eq!(cost(&Percentage { free_events: None, ..lago() }, &[450, 100, -80, 10]), "0.1");
        assert_eq!(cost(&Percentage { free_amount: None, ..lago() }, &[1000, 1000, 1000, 10]), "0.22");
        assert_eq!(cost(&Percentage { free_amount: None, free_events: None, ..lago() }, &[10, -10]), "0.2");
    }

    #[test]
    fn fees_are_held_between_bounds() {
        let price = Percentage {
            minimum_amount_per_event: Some(d("1")),
            maximum_amount_per_event: Some(d("3")),
            free_events: Some(1),
            free_amount: None,
            ..lago()
        };
        assert_eq!(cost(&price, &[5, 10, 1000]), "4");
    }

    proptest! {
        /// Promise 2: only the set of events matters.
        #[test]
        fn merging_in_any_order_gives_the_same(
            (values, shuffled) in proptest::collection::vec(-50i64..500, 1..30).prop_flat_map(|values| {
                let numbered: Vec<_> = (0i64..).zip(values).collect();
                (Just(numbered.clone()), Just(numbered).prop_shuffle())
            }),
            free_events in proptest::option::of(0u64..6),
            free_amount in proptest::option::of(0i64..600),
            minimum in proptest::option::of(0i64..3),
        ) {
            let price = Percentage {
                free_events,
                free_amount: free_amount.map(|amount| d(&amount.to_string())),
                minimum_amount_per_event: minimum.map(|amount| d(&amount.to_string())),
                ..lago()
            };
            let mut whole = Transactions::default();
            values.iter().for_each(|(at, value)| whole.add(transaction(*at, *value), &price).unwrap());
            let mut merged = Transactions::default();
            for part in shuffled.chunks(4) {
                let mut some = Transactions::default();
                part.iter().for_each(|(at, value)| some.add(transaction(*at, *value), &price).unwrap());
                merged.merge(&some, &price).unwrap();
            }
            prop_assert_eq!(price.cost_of(&whole), price.cost_of(&merged));
        }
    }
}
