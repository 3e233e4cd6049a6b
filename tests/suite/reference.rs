//! Every example of REFERENCE.md through the binary.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::support::{Row, Workspace};

/// A YAML block.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Example {
    #[serde(default)]
    meter: Map<String, Value>,
    price: Option<Map<String, Value>>,
    #[serde(default)]
    subscription: Map<String, Value>,
    #[serde(default)]
    events: Vec<Map<String, Value>>,
    /// Quantity of each window, by its start.
    windows: Option<BTreeMap<String, String>>,
    /// Quantity of each period, by its start.
    periods: Option<BTreeMap<String, String>>,
    /// Quantity of the only period.
    period: Option<String>,
    /// Its cost.
    cost: Option<String>,
    /// Cost of a period by its quantity.
    costs: Option<BTreeMap<String, String>>,
    /// Amount of a period by its quantity.
    amounts: Option<BTreeMap<String, String>>,
}

const START: &str = "2026-01-01T00:00:00Z";

#[test]
fn every_example_gives_what_it_says() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/REFERENCE.md")).unwrap();
    let blocks: Vec<_> = text.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > 25, "only {} examples", blocks.len());
    let mut problems = String::new();
    for block in blocks {
        let example: Example = serde_saphyr::from_str(block).unwrap_or_else(|error| panic!("{block}\n{error}"));
        if let Err(problem) = example.check() {
            let _ = writeln!(problems, "{block}{problem}\n");
        }
    }
    assert!(problems.is_empty(), "{problems}");
}

#[test]
fn every_known_error_names_a_case_that_is_there() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/REFERENCE.md")).unwrap();
    let names: Vec<_> = text.split("`fixtures/cases/").skip(1).map(|rest| rest.split('`').next().unwrap()).collect();
    assert_eq!(names.len(), 10, "{names:?}");
    for name in names {
        assert!(crate::support::fixtures().join("cases").join(name).is_dir(), "fixtures/cases/{name} is missing");
    }
}

impl Example {
    fn check(&self) -> Result<(), String> {
        let workspace = Workspace::new();
        // Quantities that are to be priced belong to a subscription each.
        let quantities: Vec<_> = self.costs.iter().chain(&self.amounts).flatten().map(|(quantity, _)| quantity).collect();
        self.write(&workspace, &quantities);
        let outcome = workspace.trueup(&["run", "job.yaml"]);
        if outcome.code != 0 {
            return Err(outcome.stderr);
        }
        let windows = workspace.query("SELECT * FROM usage_windows WHERE subscription_id = 's'");
        let periods = workspace.query("SELECT * FROM usage_periods WHERE subscription_id = 's'");
        let by_start = |rows: &[Row], start: &str| -> BTreeMap<_, _> {
            rows.iter().map(|row| (row[start].clone(), row["quantity"].clone())).collect()
        };
        same("windows", &self.windows, &by_start(&windows, "window_start"))?;
        same("periods", &self.periods, &by_start(&periods, "period_start"))?;
        same("period", &self.period, &periods.iter().map(|row| row["quantity"].clone()).collect())?;
        same("cost", &self.cost, &periods.iter().map(|row| row["cost"].clone()).collect())?;
        let priced = |column: &str| {
            let of = |(at, quantity): (usize, &&String)| {
                let sql = format!("SELECT {column} FROM usage_periods WHERE subscription_id = 's{at}'");
                let row = workspace.query(&sql).into_iter().next();
                ((*quantity).clone(), row.map_or_else(|| "0".to_owned(), |row| row[column].clone()))
            };
            quantities.iter().enumerate().map(of).collect::<BTreeMap<_, _>>()
        };
        same("costs", &self.costs, &priced("cost"))?;
        same("amounts", &self.amounts, &priced("amount"))
    }

    fn write(&self, workspace: &Workspace, quantities: &[&String]) {
        workspace.write(
            "job.yaml",
            "version: 1\njob: example\nsource: {kind: files, paths: [events.ndjson]}\nwindow: day\nreference:\n  \
             customers: {path: customers.csv}\n  subscriptions: {path: subscriptions.ndjson}\n  meters: {path: meters.yaml}\n  \
             prices: {path: prices.yaml}\nstore: {kind: sqlite, path: trueup.db}\n",
        );
        let mut meter = json!({"meter_id": "m", "event_name": "used", "unpriced": self.price.is_none()});
        if !quantities.is_empty() {
            meter["aggregation"] = "sum".into();
            meter["property"] = "value".into();
        }
        meter.as_object_mut().unwrap().extend(self.meter.clone());
        workspace.write("meters.yaml", json!({"meters": [meter]}).to_string());
        let price = self.price.as_ref().map(|keys| {
            let mut price = json!({"price_id": "p", "plan_id": "plan", "meter_id": "m", "currency": "USD"});
            price.as_object_mut().unwrap().extend(keys.clone());
            price
        });
        workspace.write("prices.yaml", json!({"prices": price.into_iter().collect::<Vec<_>>()}).to_string());
        let mut customers = "tenant_id,customer_id,external_customer_id\n".to_owned();
        let (mut subscriptions, mut events) = (String::new(), String::new());
        let mut subscribe = |name: &str| {
            let mut row = json!({"tenant_id": "t", "subscription_id": format!("s{name}"), "customer_id": format!("c{name}"),
                "plan_id": "plan", "currency": "USD", "billing_period": "month", "started_at": "2025-01-01T00:00:00Z"});
            row.as_object_mut().unwrap().extend(self.subscription.clone());
            let _ = writeln!(subscriptions, "{row}");
            let _ = writeln!(customers, "t,c{name},x{name}");
        };
        let mut send = |name: &str, id: String, at: &str, properties: Value| {
            let event = json!({"tenant_id": "t", "id": id, "event_name": "used", "external_customer_id": format!("x{name}"),
                "timestamp": at, "properties": properties});
            let _ = writeln!(events, "{event}");
        };
        subscribe("");
        for (number, event) in self.events.iter().enumerate() {
            let mut properties = event.clone();
            let at = properties.remove("at").unwrap();
            send("", format!("e{number}"), at.as_str().unwrap(), properties.into());
        }
        for (number, quantity) in quantities.iter().enumerate() {
            let name = number.to_string();
            subscribe(&name);
            // No usage is no event.
            if *quantity != "0" {
                let at = if self.subscription.contains_key("started_at") { "2026-01-20T00:00:00Z" } else { START };
                send(&name, format!("q{number}"), at, json!({"value": quantity}));
            }
        }
        // Somebody is always there, so that the run has a range.
        send("nobody", "other".to_owned(), START, json!({"value": "1"}));
        workspace.write("customers.csv", customers);
        workspace.write("subscriptions.ndjson", subscriptions);
        workspace.write("events.ndjson", events);
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, expected: &Option<T>, actual: &T) -> Result<(), String> {
    match expected {
        Some(expected) if expected != actual => Err(format!("{what}: expected {expected:?}, got {actual:?}")),
        _ => Ok(()),
    }
}
