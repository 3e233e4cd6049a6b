import java.time.Duration;
import java.util.*;
import java.util.concurrent.ExecutionException;
import org.apache.kafka.clients.admin.*;
import org.apache.kafka.clients.consumer.*;
import org.apache.kafka.clients.producer.*;
import org.apache.kafka.common.*;
import org.apache.kafka.common.serialization.*;

/** Proves on a running broker what Trueup's Kafka source relies on: java -cp 'jars/*' Probe.java HOST:PORT */
public class Probe {
    static String broker;

    static Map<String, Object> config(Object... pairs) {
        var map = new HashMap<String, Object>(Map.of("bootstrap.servers", broker));
        for (int i = 0; i < pairs.length; i += 2) map.put((String) pairs[i], pairs[i + 1]);
        return map;
    }

    static KafkaProducer<String, String> producer(Object... pairs) {
        return new KafkaProducer<>(config(pairs), new StringSerializer(), new StringSerializer());
    }

    static KafkaConsumer<String, String> consumer(String isolation, TopicPartition partition) {
        var consumer = new KafkaConsumer<>(config("isolation.level", isolation, "auto.offset.reset", "none"),
            new StringDeserializer(), new StringDeserializer());
        consumer.assign(List.of(partition));
        return consumer;
    }

    /** All records up to the end offset that the isolation level sees, as "offset:key=value". */
    static List<String> read(String isolation, TopicPartition partition) {
        try (var consumer = consumer(isolation, partition)) {
            long end = consumer.endOffsets(List.of(partition)).get(partition);
            consumer.seekToBeginning(List.of(partition));
            var records = new ArrayList<String>();
            while (consumer.position(partition) < end)
                for (var r : consumer.poll(Duration.ofSeconds(1))) records.add(r.offset() + ":" + r.key() + "=" + r.value());
            return records;
        }
    }

    static long end(String isolation, TopicPartition partition) {
        try (var consumer = consumer(isolation, partition)) {
            return consumer.endOffsets(List.of(partition)).get(partition);
        }
    }

    static void check(String what, Object got, Object wanted) {
        if (!Objects.equals(got, wanted)) throw new AssertionError(what + ": " + got + ", not " + wanted);
        System.out.println("ok  kafka: " + what);
    }

    public static void main(String[] args) throws Exception {
        broker = args[0];
        String suffix = "-" + System.nanoTime();
        var plain = new TopicPartition("plain" + suffix, 0);
        var tx = new TopicPartition("tx" + suffix, 0);
        var compact = new TopicPartition("compact" + suffix, 0);
        try (var admin = Admin.create(config())) {
            admin.createTopics(List.of(
                new NewTopic(plain.topic(), 3, (short) 1),
                new NewTopic(tx.topic(), 1, (short) 1),
                new NewTopic(compact.topic(), 1, (short) 1).configs(Map.of("cleanup.policy", "compact",
                    "segment.ms", "100", "min.cleanable.dirty.ratio", "0.01", "delete.retention.ms", "100")))).all().get();

            long january = 1767225600000L;
            try (var p = producer("linger.ms", 0)) {
                for (int i = 0; i < 10; i++) p.send(new ProducerRecord<>(plain.topic(), 0, january + i * 1000L, "k" + i, "v" + i)).get();
            }
            check("records of last January are kept and read", read("read_committed", plain).size(), 10);
            try (var c = consumer("read_committed", plain)) {
                check("offset by timestamp", c.offsetsForTimes(Map.of(plain, january + 4500)).get(plain).offset(), 5L);
                check("no offset for a time after the last record", c.offsetsForTimes(Map.of(plain, january + 10000)).get(plain), null);
            }

            try (var p = producer("transactional.id", "t" + suffix)) {
                p.initTransactions();
                p.beginTransaction();
                p.send(new ProducerRecord<>(tx.topic(), "a", "aborted"));
                p.flush();
                p.abortTransaction();
                p.beginTransaction();
                p.send(new ProducerRecord<>(tx.topic(), "c", "committed"));
                p.commitTransaction();
                // The marker follows the commit's answer by milliseconds.
                while (end("read_committed", tx) < end("read_uncommitted", tx)) Thread.sleep(20);
                check("an aborted transaction is skipped", read("read_committed", tx), List.of("2:c=committed"));
                check("the last offset is a marker that is never delivered", end("read_committed", tx), 4L);
                check("uncommitted reading sees both", read("read_uncommitted", tx).size(), 2);
                p.beginTransaction();
                p.send(new ProducerRecord<>(tx.topic(), "o", "open"));
                p.flush();
                check("an open transaction holds back the last stable offset",
                    List.of(end("read_committed", tx), end("read_uncommitted", tx)), List.of(4L, 5L));
                p.abortTransaction();
            }

            try (var p = producer("linger.ms", 0)) {
                for (String v : new String[] {"1", "2", "3"}) {
                    p.send(new ProducerRecord<>(compact.topic(), "k", v)).get();
                    Thread.sleep(150);
                }
                p.send(new ProducerRecord<>(compact.topic(), "last", "x")).get();
                long until = System.currentTimeMillis() + 30000;
                while (read("read_committed", compact).size() > 2 && System.currentTimeMillis() < until) Thread.sleep(200);
            }
            check("a compacted topic has gaps in its offsets", read("read_committed", compact), List.of("2:k=3", "3:last=x"));

            admin.deleteRecords(Map.of(plain, RecordsToDelete.beforeOffset(5))).all().get();
            try (var c = consumer("read_committed", plain)) {
                c.seek(plain, 2);
                String failed = "";
                try { c.poll(Duration.ofSeconds(5)); } catch (OffsetOutOfRangeException e) { failed = "out of range"; }
                check("a start before the log's first record fails", failed, "out of range");
            }
            admin.deleteTopics(List.of(plain.topic(), tx.topic(), compact.topic())).all().get();
        }
    }
}
